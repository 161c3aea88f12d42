"""DIST: class scores that correlate with the teacher's, over classes and over regions or anchors."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import DIST, DenseDIST
from sharedkd.modeling.stages import stage_dict

paper = "Knowledge Distillation from A Stronger Teacher, NeurIPS 2022"

# beta and gamma: the defaults of the authors' code, for segmentation; their detection configs are
# not public.  `dist:auto` finds a weight for a detector.
_two_stage = L(stage_dict)(
    dist=L(Stage)(loss=L(DIST)(beta=1.0, gamma=1.0, temperature=1.0), weight=1.0)
)
_one_stage = L(stage_dict)(
    dist=L(Stage)(loss=L(DenseDIST)(beta=1.0, gamma=1.0, temperature=1.0), weight=1.0)
)

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_two_stage, mask_rcnn=_two_stage, retinanet=_one_stage, fcos=_one_stage)
