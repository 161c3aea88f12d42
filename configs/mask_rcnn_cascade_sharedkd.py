"""Cascade Mask R-CNN X101 -> Mask R-CNN R50, 2x.

The model zoo has no weights for this teacher: train it first, with configs/teachers/cascade_mask_rcnn_x101.py.
"""

import os

from sharedkd.config import distill

from .mask_rcnn_plain import dataloader, lr_multiplier, model, optimizer, train

model = distill(
    student=model,
    teacher=os.path.join(os.path.dirname(__file__), "teachers/cascade_mask_rcnn_x101.py"),
    weights="output/cascade_mask_rcnn_x101/model_final.pth",
)
