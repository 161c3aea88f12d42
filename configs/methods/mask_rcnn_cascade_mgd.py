"""Table 2 of the publication: MGD, Cascade Mask R-CNN X101 -> Mask R-CNN R50, 2x."""

from ..common.methods.mgd import stages as _stages
from ..mask_rcnn_cascade_sharedkd import dataloader, lr_multiplier, model, optimizer, train

model.stages = _stages["mask_rcnn"]
