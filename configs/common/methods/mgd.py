"""MGD: masked generative distillation."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import MGD
from sharedkd.modeling.stages import stage_dict

paper = "Masked Generative Distillation, ECCV 2022"

# All numbers: the configs of the authors' code.
_two_stage = L(stage_dict)(
    mgd=L(Stage)(
        loss=L(MGD)(alpha=5e-7, masked=0.45, strides=[4, 8, 16, 32]), weight=1.0, published=True
    )
)

_one_stage = L(stage_dict)(
    mgd=L(Stage)(
        loss=L(MGD)(alpha=2e-5, masked=0.65, strides=[8, 16, 32, 64, 128]),
        weight=1.0,
        published=True,
    )
)

# Student's family -> what `model.stages` becomes.  FCOS with the numbers of RetinaNet is ours.
stages = dict(faster_rcnn=_two_stage, mask_rcnn=_two_stage, retinanet=_one_stage, fcos=_one_stage)
