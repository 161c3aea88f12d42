"""FitNets without adaptation: the student's maps should equal the teacher's, of the same width."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import FitNets
from sharedkd.modeling.stages import stage_dict

paper = "FitNets: Hints for Thin Deep Nets, ICLR 2015"

# For detectors no weight is published: 1.0 on the mean squared error of every level is ours.
_stages = L(stage_dict)(fitnets=L(Stage)(loss=L(FitNets)(adapter=0), weight=1.0))

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_stages, mask_rcnn=_stages, retinanet=_stages, fcos=_stages)
