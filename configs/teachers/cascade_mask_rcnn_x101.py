"""Cascade Mask R-CNN X101-32x8d, 2x: the teacher of mask_rcnn_cascade_sharedkd.py."""

from detectron2.model_zoo import get_config

from ..common.resnext import INIT, use_x101
from ..mask_rcnn_plain import dataloader, lr_multiplier, optimizer, train

model = use_x101(get_config("common/models/cascade_rcnn.py").model)
train.init_checkpoint = INIT
train.output_dir = "output/cascade_mask_rcnn_x101"
