"""The published ablation: Shared-KD as published, without its cross-layer part."""

from ..methods.faster_rcnn_shared_kd_published import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

del model.stages.cross
