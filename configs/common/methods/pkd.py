"""PKD: the student's maps should correlate with the teacher's, whatever their scale."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import PKD
from sharedkd.modeling.stages import stage_dict

paper = (
    "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient, "
    "NeurIPS 2022"
)

# The first four levels: p6 of a two-stage and p7 of a one-stage student take no part.  Published
# (mmrazor's configs): Faster R-CNN and RetinaNet.  The same for Mask R-CNN and FCOS is ours.
_two_stage = L(stage_dict)(
    pkd=L(Stage)(loss=L(PKD)(strides=[4, 8, 16, 32]), weight=6.0, published=True)
)
_one_stage = L(stage_dict)(
    pkd=L(Stage)(loss=L(PKD)(strides=[8, 16, 32, 64]), weight=10.0, published=True)
)

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_two_stage, mask_rcnn=_two_stage, retinanet=_one_stage, fcos=_one_stage)
