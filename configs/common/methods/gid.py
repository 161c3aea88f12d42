"""GID: the boxes about which teacher and student disagree most."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import GID
from sharedkd.modeling.stages import stage_dict

paper = "General Instance Distillation for Object Detection, CVPR 2021"


def _stages(positions):
    loss = L(GID)(
        feature=5e-4,
        relation=40.0,
        response_class=0.1,
        response_box=1.0,
        instances=10,
        candidates=3000,
        nms=0.3,
        min_size=10.0,
        crop=10,
        match=0.5,
        positions=positions,
        beta=0.0,
    )
    return L(stage_dict)(gid=L(Stage)(loss=loss, weight=1.0))


# beta 0.0 is L1, as Detectron2's own detectors regress their boxes; the authors use 0.1 with students
# that are trained with smooth L1.
# Student's family -> what `model.stages` becomes.  The code has RetinaNet only; that the others, where
# a two-stage detector's RPN is the dense head, have its numbers is ours.  So is what is matched with
# instances for FCOS: around its points are squares of a stride's size, which no instance is like.
stages = dict(
    faster_rcnn=_stages("anchors"),
    mask_rcnn=_stages("anchors"),
    retinanet=_stages("anchors"),
    fcos=_stages("boxes"),
)
