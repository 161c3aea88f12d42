"""Cascade Mask R-CNN X101 -> Mask R-CNN R50, 2x; train the teacher first, see its config."""

from detectron2.config import LazyCall as L

from sharedkd import FrozenTeacher, SharedKD
from sharedkd.config import shared_kd_stages

from .mask_rcnn_plain import dataloader, lr_multiplier, model, optimizer, train

model = L(SharedKD)(
    student=model,
    teacher=L(FrozenTeacher)(config="output/cascade_mask_rcnn_x101"),
    stages=shared_kd_stages(),
    input_format="${dataloader.train.mapper.image_format}",
)
