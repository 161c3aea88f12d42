"""FKD: attention-guided and non-local feature distillation."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import FKD
from sharedkd.modeling.stages import stage_dict

paper = (
    "Improve Object Detection with Feature-based Knowledge Distillation: "
    "Towards Accurate and Efficient Detectors, ICLR 2021"
)

# Weights, temperature and levels of mmrazor's port; copies of the authors' code have the same and use
# p6 too.  The non-local blocks pool once, as the authors' do; mmrazor's pool twice.
_two_stage = L(stage_dict)(
    fkd=L(Stage)(
        loss=L(FKD)(
            feature=7e-5,
            channel=4e-3,
            spatial=4e-3,
            nonlocal_=7e-5,
            strides=[4, 8, 16, 32],
            temperature=0.5,
            pool=[8, 4, 2, 2],
            reduction=[4, 4, 2, 2],
            channel_mask=False,
        ),
        weight=1.0,
        published=True,
    )
)

# The weights are recalled from the paper.  The rest was read in third-party copies of the authors'
# code, whose weights are 4.2e-4 and 2.4e-2.
_one_stage = L(stage_dict)(
    fkd=L(Stage)(
        loss=L(FKD)(
            feature=4e-4,
            channel=2e-2,
            spatial=2e-2,
            nonlocal_=4e-4,
            strides=[8, 16, 32, 64, 128],
            temperature=0.1,
            pool=[8, 4, 2, 2, 2],
            reduction=[4, 4, 2, 2, 2],
            channel_mask=True,
        ),
        weight=1.0,
        published=True,
    )
)

# Student's family -> what `model.stages` becomes.  Mask R-CNN with Faster R-CNN's numbers is ours.
stages = dict(faster_rcnn=_two_stage, mask_rcnn=_two_stage, retinanet=_one_stage, fcos=_one_stage)
