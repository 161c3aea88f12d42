"""Shared-KD as published: raw distances of all levels, both losses at weight 2, learning mutually."""

from sharedkd.config import published_stages

paper = "Shared Knowledge Distillation Network for Object Detection, Electronics 2024"

_stages = published_stages(weight=2.0)

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_stages, mask_rcnn=_stages, retinanet=_stages, fcos=_stages)
