"""The published ablation: Shared-KD as published, without its cross-layer part."""

from .faster_rcnn_published import dataloader, lr_multiplier, model, optimizer, train

del model.stages.cross
