"""Own COCO-format data, no distillation: trains a teacher, or the plain student to compare with."""
from .common.own_data import data, dataloader
from .common.short_schedule import lr_multiplier, optimizer, train
from .common.small_models import small_faster_rcnn

model = small_faster_rcnn(depth=18, num_classes="${data.num_classes}")
