"""Shared-KD with this project's defaults."""

from sharedkd.config import ONE_STAGE_WEIGHT, shared_kd_stages

paper = "Shared Knowledge Distillation Network for Object Detection, Electronics 2024"

_two_stage = shared_kd_stages()
_one_stage = shared_kd_stages(ONE_STAGE_WEIGHT)

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_two_stage, mask_rcnn=_two_stage, retinanet=_one_stage, fcos=_one_stage)
