"""Foundation: the student's projected maps should point where the teacher's do, whatever its kind."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import Cosine
from sharedkd.modeling.stages import stage_dict

paper = "Cosine with a frozen backbone's features; ours, in the style of AM-RADIO, CVPR 2024"

# For detectors no weight is published: 1.0 on every level is ours.
_stages = L(stage_dict)(cosine=L(Stage)(loss=L(Cosine)(adapter=1), weight=1.0))

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_stages, mask_rcnn=_stages, retinanet=_stages, fcos=_stages)
