"""The published ablation: Shared-KD as published, without its cross-layer part."""

from sharedkd.config import published_stages

from ..faster_rcnn_sharedkd import dataloader, lr_multiplier, model, optimizer, train

model.stages = published_stages()
del model.stages.cross
