"""Table 2 of the publication: FGD, Cascade Mask R-CNN X101 -> Mask R-CNN R50, 2x."""

from ..common.methods.fgd import stages as _stages
from ..mask_rcnn_cascade_sharedkd import dataloader, lr_multiplier, model, optimizer, train

model.stages = _stages["mask_rcnn"]
