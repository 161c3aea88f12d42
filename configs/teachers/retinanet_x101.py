"""RetinaNet X101-32x8d, 2x: the teacher of retinanet_x101_sharedkd.py."""

from ..common.resnext import INIT, use_x101
from ..retinanet_plain import dataloader, lr_multiplier, model, optimizer, train

use_x101(model)
train.init_checkpoint = INIT
train.output_dir = "output/retinanet_x101"
