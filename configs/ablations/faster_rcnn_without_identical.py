"""The published ablation: Shared-KD as published, without its identical-layer part."""

from .faster_rcnn_published import dataloader, lr_multiplier, model, optimizer, train

del model.stages.identical
model.teacher = None
