"""As custom_coco_teacher.py, with instance masks: Mask R-CNN."""

from .common.small_models import small_mask_rcnn
from .custom_coco_teacher import data, dataloader, lr_multiplier, optimizer, train

data.masks = True
model = small_mask_rcnn(depth=50, num_classes="${data.num_classes}")
