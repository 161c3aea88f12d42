"""Own COCO-format data: distil a Faster R-CNN into ResNet-18.  See docs/own_data.md."""
from sharedkd.config import distill

from .custom_coco_plain import data, dataloader, lr_multiplier, model, optimizer, train

model = distill(student=model, teacher="???")
