"""Own COCO-format data: a MobileNetV3-Large Faster R-CNN, distilled from custom_coco_teacher.py's run.

ImageNet weights by torchvision's name, or a file of them:
train.init_checkpoint=MobileNet_V3_Large_Weights.IMAGENET1K_V2
"""

from .common.mobile_models import mobile_faster_rcnn
from .custom_coco import data, dataloader, lr_multiplier, model, optimizer, train

model.student = mobile_faster_rcnn(num_classes="${data.num_classes}")
