"""A schedule for small data: AdamW, cosine after a short warm-up, whatever the length of the run is."""

import torch
from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from .train import train

train.update(max_iter=None, epochs=50, eval_period=None, clip_grad_norm=10.0)
train.checkpointer.update(period=None, max_to_keep=2)

optimizer = L(torch.optim.AdamW)(
    params=get_config("common/optim.py").SGD.params,
    lr=5e-4,
    weight_decay=0.01,
    fused=True,  # the same update, in less time
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
    warmup_length=0.05,
    warmup_factor=0.01,
)
