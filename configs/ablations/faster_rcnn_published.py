"""Shared-KD as published: raw distances at weight 2, from the first iteration to the last."""

from sharedkd.config import published_stages

from ..faster_rcnn_sharedkd import dataloader, lr_multiplier, model, optimizer, train

model.stages = published_stages()
