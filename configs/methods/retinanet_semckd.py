"""Table 4 of the publication: SemCKD, RetinaNet R101 -> R50, 2x."""

from ..common.methods.semckd import stages as _stages
from ..retinanet_sharedkd import dataloader, lr_multiplier, model, optimizer, train

model.stages = _stages["retinanet"]
