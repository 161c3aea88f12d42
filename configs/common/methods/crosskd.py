"""CrossKD: what the student's head has, finished by the teacher's head, should give its predictions."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import CrossKD, RegionCrossKD
from sharedkd.modeling.stages import stage_dict

paper = "CrossKD: Cross-Head Knowledge Distillation for Object Detection, CVPR 2024"

# The cut is the paper's; both weights are ours, those of the detectors' own losses.
_one_stage = L(stage_dict)(
    crosskd=L(Stage)(loss=L(CrossKD)(score=1.0, overlap=1.0, left=1), weight=1.0)
)
# Ours: nothing is published for two-stage heads.  The teacher's last of two layers, and weights as above.
_two_stage = L(stage_dict)(
    crosskd=L(Stage)(loss=L(RegionCrossKD)(score=1.0, box=1.0, left=1), weight=1.0)
)

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_two_stage, mask_rcnn=_two_stage, retinanet=_one_stage, fcos=_one_stage)
