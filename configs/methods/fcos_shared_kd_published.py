"""Table 1 of the publication: Shared-KD as published, FCOS R101 -> R50, 2x."""

from ..common.methods.shared_kd_published import stages as _stages
from ..fcos_sharedkd import dataloader, lr_multiplier, model, optimizer, train

model.stages = _stages["fcos"]
