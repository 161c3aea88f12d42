"""FCOS R50, 2x, without distillation."""

from detectron2.model_zoo import get_config

from .retinanet_plain import dataloader, lr_multiplier, optimizer, train

model = get_config("common/models/fcos.py").model
