"""Own COCO-format data: the ResNet-18 Faster R-CNN, distilled from custom_coco_teacher.py's run."""

from sharedkd.config import distill

from .common.own_data import trained_teacher as _teacher
from .custom_coco_plain import data, dataloader, lr_multiplier, model, optimizer, train

model = distill(student=model, **_teacher)
