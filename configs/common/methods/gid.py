"""GID: the boxes about which teacher and student disagree most."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import GID
from sharedkd.stages import stage_dict

paper = "General Instance Distillation for Object Detection, CVPR 2021"

_stages = L(stage_dict)(
    gid=L(Stage)(
        loss=L(GID)(
            feature=5e-4,
            relation=40.0,
            response_class=0.1,
            response_box=1.0,
            instances=10,
            candidates=3000,
            nms=0.3,
            min_size=10.0,
            crop=10,
            match=0.5,  # ours: of the teacher's boxes, not of the anchors
            beta=0.1,
        ),
        weight=1.0,
    )
)

# Student's family -> what `model.stages` becomes.  The code has RetinaNet only; the numbers of the
# other families, where a two-stage detector's RPN is the dense head, are ours: the same.
stages = dict(faster_rcnn=_stages, mask_rcnn=_stages, retinanet=_stages, fcos=_stages)
