"""Feature fusion: teacher and student maps together make the target of the student."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import FeatureFusion
from sharedkd.modeling.stages import stage_dict

paper = (
    "in the style of Feature Fusion-based Collaborative Learning for Knowledge Distillation, "
    "Int. J. Distributed Sensor Networks 2021"
)

# The publication trains classifiers: all weights are ours.
_stages = L(stage_dict)(
    feature_fusion=L(Stage)(loss=L(FeatureFusion)(fit=1.0, feature=1.0, response=1.0), weight=1.0)
)

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_stages, mask_rcnn=_stages, retinanet=_stages, fcos=_stages)
