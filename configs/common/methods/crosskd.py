"""CrossKD: the student's head maps, finished by the teacher's head, should give its predictions."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import CrossKD
from sharedkd.modeling.stages import stage_dict

paper = "CrossKD: Cross-Head Knowledge Distillation for Object Detection, CVPR 2024"

# The cut is the paper's; both weights are ours, those of the detectors' own losses.
_stages = L(stage_dict)(
    crosskd=L(Stage)(loss=L(CrossKD)(score=1.0, overlap=1.0, left=1), weight=1.0)
)

# Student's family -> what `model.stages` becomes.  It is for dense heads alone.
stages = dict(retinanet=_stages, fcos=_stages)
