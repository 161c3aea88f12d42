"""Own COCO-format data: the plain ResNet-18 Faster R-CNN, to compare the distilled one with."""

from .common.own_data import data, dataloader
from .common.short_schedule import lr_multiplier, optimizer, train
from .common.small_models import small_faster_rcnn

model = small_faster_rcnn(depth=18, num_classes="${data.num_classes}")
