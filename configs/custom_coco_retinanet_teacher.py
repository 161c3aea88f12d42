"""As custom_coco_teacher.py, with a one-stage detector: RetinaNet."""

from .common.small_models import small_retinanet
from .custom_coco_teacher import data, dataloader, lr_multiplier, optimizer, train

model = small_retinanet(depth=50, num_classes="${data.num_classes}")
