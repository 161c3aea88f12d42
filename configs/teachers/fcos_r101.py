"""FCOS R101, 2x: the teacher of fcos_sharedkd.py."""

from ..fcos_plain import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
train.output_dir = "output/fcos_r101"
