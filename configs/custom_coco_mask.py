"""As custom_coco.py, with instance masks: Mask R-CNN."""

from sharedkd.config import distill

from .common.own_data import trained_teacher as _teacher
from .custom_coco_mask_plain import data, dataloader, lr_multiplier, model, optimizer, train

model = distill(student=model, **_teacher)
