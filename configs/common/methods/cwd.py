"""CWD: each channel of the student should be active where the teacher's is."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import CWD
from sharedkd.modeling.stages import stage_dict

paper = "Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021"

# Every level of the FPN.  Published (mmrazor's configs): Faster R-CNN and RetinaNet.  That Mask
# R-CNN and FCOS take the same is ours.
_stages = L(stage_dict)(cwd=L(Stage)(loss=L(CWD)(temperature=1.0), weight=10.0))

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_stages, mask_rcnn=_stages, retinanet=_stages, fcos=_stages)
