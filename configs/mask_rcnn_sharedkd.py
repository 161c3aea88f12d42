"""Mask R-CNN X101 -> Mask R-CNN R50, 2x; the teacher and its weights come from the model zoo."""

from detectron2.config import LazyCall as L

from sharedkd import FrozenTeacher, SharedKD
from sharedkd.config import shared_kd_stages

from .mask_rcnn_plain import dataloader, lr_multiplier, model, optimizer, train

model = L(SharedKD)(
    student=model,
    teacher=L(FrozenTeacher)(config="COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml"),
    stages=shared_kd_stages(),
    input_format="${dataloader.train.mapper.image_format}",
)
