"""ReviewKD: the student's levels, fused from the coarsest down, should equal the teacher's."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import ReviewKD
from sharedkd.modeling.stages import stage_dict

paper = "Distilling Knowledge via Knowledge Review, CVPR 2021"


def _stages(weight):
    return L(stage_dict)(reviewkd=L(Stage)(loss=L(ReviewKD)(mid_channels=256), weight=weight))


# Student's family -> what `model.stages` becomes.  The weights are published per pair, these are of
# R50 students with R101 teachers; others: Faster R-CNN R18 with R101 1.2, MobileNetV2 with R50 2.0;
# Mask R-CNN R18 with R101 1.5, MobileNetV2 with R50 1.0.
stages = dict(
    faster_rcnn=_stages(1.0),
    mask_rcnn=_stages(0.8),
    retinanet=_stages(1.0),
    fcos=_stages(1.0),  # not published: as RetinaNet, ours
)
