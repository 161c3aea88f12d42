"""Cross-layer distillation alone: the student's levels learn from each other, without a teacher."""

from sharedkd.config import shared_kd_stages

paper = "the cross-layer part of Shared-KD alone (Electronics 2024)"

_stages = shared_kd_stages()
del _stages.identical
_stages.cross.weight = "auto"

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_stages, mask_rcnn=_stages, retinanet=_stages, fcos=_stages)
