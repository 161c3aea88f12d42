"""FGD: focal distillation of foreground, background and attention, and of the global context."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import FGD
from sharedkd.modeling.stages import stage_dict

paper = "Focal and Global Knowledge Distillation for Detectors, CVPR 2022"

# All numbers: the configs of the authors' code.
_two_stage = L(stage_dict)(
    fgd=L(Stage)(
        loss=L(FGD)(
            foreground=5e-5,
            background=2.5e-5,
            attention=5e-5,
            global_=5e-7,
            strides=[4, 8, 16, 32],
            temperature=0.5,
        ),
        weight=1.0,
        published=True,
    )
)

_retinanet = L(stage_dict)(
    fgd=L(Stage)(
        loss=L(FGD)(
            foreground=1e-3,
            background=5e-4,
            attention=5e-4,
            global_=5e-6,
            strides=[8, 16, 32, 64, 128],
            temperature=0.5,
        ),
        weight=1.0,
        published=True,
    )
)

_fcos = L(stage_dict)(
    fgd=L(Stage)(
        loss=L(FGD)(
            foreground=1.6e-3,
            background=8e-4,
            attention=8e-4,
            global_=8e-6,
            strides=[8, 16, 32, 64, 128],
            temperature=0.8,
        ),
        weight=1.0,
        published=True,
    )
)

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_two_stage, mask_rcnn=_two_stage, retinanet=_retinanet, fcos=_fcos)
