"""Own COCO-format data: train the teacher, a ResNet-50 Faster R-CNN."""

from .common.small_models import small_faster_rcnn
from .custom_coco_plain import data, dataloader, lr_multiplier, optimizer, train

model = small_faster_rcnn(depth=50, num_classes="${data.num_classes}")
