"""Faster R-CNN R50, 2x, without distillation."""

from .mask_rcnn_plain import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.mapper.use_instance_mask = False
for key in [k for k in model.roi_heads if k.startswith("mask_")]:
    del model.roi_heads[key]
