"""FRS: features and class scores, weighted by what the teacher's classifier sees."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import FRS
from sharedkd.modeling.stages import stage_dict

paper = "Distilling Object Detectors with Feature Richness, NeurIPS 2021"


def _stages(feature, response):
    loss = L(FRS)(feature=feature, response=response, adapter=3)
    # Linear warm-up over the first 500 iterations, a fraction here: short runs reach the weight, too.
    return L(stage_dict)(frs=L(Stage)(loss=loss, weight=1.0, ramp=500 / 180000))


# Student's family -> what `model.stages` becomes.  Mask R-CNN is not in the paper's code: the numbers
# are those of Faster R-CNN.
stages = dict(
    faster_rcnn=_stages(feature=0.002, response=0.1),
    mask_rcnn=_stages(feature=0.002, response=0.1),
    retinanet=_stages(feature=0.005, response=0.02),
    fcos=_stages(feature=0.01, response=0.05),
)
