"""The embedded example: the teacher, a ResNet-50 Mask R-CNN that trains longer than its students."""

from pathlib import Path

from ..common.small_models import tiny_mask_rcnn
from .plain import data, dataloader, lr_multiplier, optimizer, shapes, train

model = tiny_mask_rcnn(depth=50, num_classes="${data.num_classes}")
train.update(max_iter=450, output_dir=str(Path(train.output_dir).with_name("teacher")))
