"""PGD: features weighted by where the teacher predicts each object best."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import PGD
from sharedkd.modeling.stages import stage_dict

paper = "Prediction-Guided Distillation for Dense Object Detection, ECCV 2022"


def _stages(foreground, positions):
    loss = L(PGD)(
        foreground=foreground,
        background=0.5 * foreground,
        box=1.6 * foreground,
        attention=8e-4,
        positions=positions,
        xi_score=0.8,
        xi_box=0.6,
        growth=0.25,
        temperature=0.8,
    )
    return L(stage_dict)(pgd=L(Stage)(loss=loss, weight=1.0))


# The configs of the authors' code for FCOS and for ATSS, which has an anchor a position.  That the other
# families take those of ATSS is ours.
_anchors = _stages(foreground=0.08, positions=9)

# Student's family -> what `model.stages` becomes.
stages = dict(
    faster_rcnn=_anchors,
    mask_rcnn=_anchors,
    retinanet=_anchors,
    fcos=_stages(foreground=0.04, positions=30),
)
