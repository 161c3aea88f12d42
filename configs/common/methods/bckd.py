"""BCKD: each class score of a dense head as a binary one, and boxes by their overlap."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import BCKD
from sharedkd.modeling.stages import stage_dict

paper = "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection, ICCV 2023"

# Both weights: the configs of the authors' code, for GFL.
_stages = L(stage_dict)(bckd=L(Stage)(loss=L(BCKD)(score=1.0, overlap=4.0), weight=1.0))

# Student's family -> what `model.stages` becomes.  It is for dense heads alone.
stages = dict(retinanet=_stages, fcos=_stages)
