"""DKD: class logits, split into the target class and the others."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import DKD, DenseDKD
from sharedkd.modeling.stages import stage_dict

paper = "Decoupled Knowledge Distillation, CVPR 2022"

_two_stage = L(stage_dict)(
    dkd=L(Stage)(loss=L(DKD)(alpha=1.0, beta=0.25, temperature=1.0), weight=1.0)
)
# Ours: nothing is published for sigmoid heads.  alpha and beta as above; gamma as in
# focal loss.
_one_stage = L(stage_dict)(
    dkd=L(Stage)(loss=L(DenseDKD)(alpha=1.0, beta=0.25, gamma=2.0), weight=1.0)
)

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_two_stage, mask_rcnn=_two_stage, retinanet=_one_stage, fcos=_one_stage)
