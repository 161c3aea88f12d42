"""In the style of student self-reflection: channels, responses, and a review inside the student."""

from detectron2.config import LazyCall as L

from sharedkd import CrossLayer, Stage
from sharedkd.losses import CWD, DKD, DenseDKD
from sharedkd.modeling.stages import stage_dict

paper = "in the style of Multi-target Knowledge Distillation via Student Self-reflection, IJCV 2023"

# Read: the abstract.  Its three targets are the channels of the network's stages, the responses after
# each, and a review in which a stage learns from the student's own responses.  Published for
# classifiers; for detectors all is our reading: channels are those of the FPN's levels (CWD), responses
# the class scores of regions or anchors (DKD), and the review compares maps, each stage of the backbone
# with the next deeper one, since the scores of different levels are of different objects.
_channels = L(Stage)(loss=L(CWD)(temperature=1.0), weight=10.0)
_review = L(CrossLayer)(
    tap="backbone", pairs="adjacent", direction="deep_to_shallow", normalize="instance"
)
# Weights: as in the recipes cwd and dkd; those of the review are ours.
_two_stage = L(stage_dict)(
    channels=_channels,
    responses=L(Stage)(loss=L(DKD)(alpha=1.0, beta=0.25), weight=1.0),
    review=L(Stage)(loss=_review, weight=0.1),
)
_one_stage = L(stage_dict)(
    channels=_channels,
    responses=L(Stage)(loss=L(DenseDKD)(alpha=1.0, beta=0.25), weight=1.0),
    review=L(Stage)(loss=_review, weight=0.5),
)

# Student's family -> what `model.stages` becomes.
stages = dict(faster_rcnn=_two_stage, mask_rcnn=_two_stage, retinanet=_one_stage, fcos=_one_stage)
