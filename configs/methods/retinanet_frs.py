"""Table 1 of the publication: FRS, RetinaNet R101 -> R50, 2x."""

from ..common.methods.frs import stages as _stages
from ..retinanet_sharedkd import dataloader, lr_multiplier, model, optimizer, train

model.stages = _stages["retinanet"]
