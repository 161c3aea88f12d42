"""The published weight study: raw distances, both losses at weight 10."""

from sharedkd.config import published_stages

from ..retinanet_x101_sharedkd import dataloader, lr_multiplier, model, optimizer, train

model.stages = published_stages(weight=10)
