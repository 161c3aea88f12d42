"""As custom_coco_plain.py, with a one-stage detector: RetinaNet."""

from .common.small_models import small_retinanet
from .custom_coco_plain import data, dataloader, lr_multiplier, optimizer, train

model = small_retinanet(depth=18, num_classes="${data.num_classes}")
