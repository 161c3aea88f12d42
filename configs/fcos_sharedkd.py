"""FCOS R101 -> R50, 2x.

The model zoo has no weights for this teacher: train it first, with configs/teachers/fcos_r101.py.
"""

import os

from sharedkd.config import ONE_STAGE_WEIGHT, distill, shared_kd_stages

from .fcos_plain import dataloader, lr_multiplier, model, optimizer, train

model = distill(
    student=model,
    teacher=os.path.join(os.path.dirname(__file__), "teachers/fcos_r101.py"),
    weights="output/fcos_r101/model_final.pth",
    stages=shared_kd_stages(ONE_STAGE_WEIGHT),
)
