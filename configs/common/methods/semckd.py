"""SemCKD for detectors: each student level learns from all teacher levels, by attention."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import SemCKD
from sharedkd.modeling.stages import stage_dict

paper = "adapted from Cross-Layer Distillation with Semantic Calibration, AAAI 2021"

# Published for classification: weight 400 on CIFAR-100, 50 on ImageNet.  Nothing is published for
# detection: weight 1 is ours.  `loss.hidden` makes the 25 regressors narrower.
_stages = L(stage_dict)(semckd=L(Stage)(loss=L(SemCKD)(temperature=1.0), weight=1.0))

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_stages, mask_rcnn=_stages, retinanet=_stages, fcos=_stages)
