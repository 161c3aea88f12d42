"""RetinaNet X101 -> R50, 2x: the pair of the published weight study.

The model zoo has no weights for this teacher: train it first, with configs/teachers/retinanet_x101.py.
"""

import os

from sharedkd.config import ONE_STAGE_WEIGHT, distill, shared_kd_stages

from .retinanet_plain import dataloader, lr_multiplier, model, optimizer, train

model = distill(
    student=model,
    teacher=os.path.join(os.path.dirname(__file__), "teachers/retinanet_x101.py"),
    weights="output/retinanet_x101/model_final.pth",
    stages=shared_kd_stages(ONE_STAGE_WEIGHT),
)
