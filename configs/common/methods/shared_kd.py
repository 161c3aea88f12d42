"""Shared-KD with this project's defaults."""

from sharedkd.config import shared_kd_stages

paper = "Shared Knowledge Distillation Network for Object Detection, Electronics 2024"

_stages = shared_kd_stages()

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_stages, mask_rcnn=_stages, retinanet=_stages, fcos=_stages)
