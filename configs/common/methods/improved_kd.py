"""In the style of Improved KD: several teacher levels, drawn positions, decoupled class logits."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import DKD, DenseDKD, ImprovedKD
from sharedkd.modeling.stages import stage_dict

paper = (
    "in the style of An Improved Knowledge Distillation Algorithm and Its Application to Object "
    "Detection, CMC 2025, 83(2)"
)

# All numbers are ours: only the paper's abstract is public, and it has none.  The logits' weights
# are those published for DKD on two-stage detectors.
_features = L(Stage)(loss=L(ImprovedKD)(tap="fpn", reach=1, samples=0.5), weight=1.0)
_two_stage = L(stage_dict)(
    features=_features, logits=L(Stage)(loss=L(DKD)(alpha=1.0, beta=0.25), weight=1.0)
)
_one_stage = L(stage_dict)(
    features=_features, logits=L(Stage)(loss=L(DenseDKD)(alpha=1.0, beta=0.25), weight=1.0)
)

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_two_stage, mask_rcnn=_two_stage, retinanet=_one_stage, fcos=_one_stage)
