"""RetinaNet R50, 2x, without distillation."""

from detectron2.model_zoo import get_config

from .common.coco import dataloader, lr_multiplier, optimizer, train

model = get_config("common/models/retinanet.py").model
dataloader.train.mapper.use_instance_mask = False
optimizer.lr = 0.01
