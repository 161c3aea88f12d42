"""As custom_coco.py, with a one-stage student: RetinaNet."""

from sharedkd.config import ONE_STAGE_WEIGHT, distill, shared_kd_stages

from .common.own_data import trained_teacher as _teacher
from .custom_coco_retinanet_plain import data, dataloader, lr_multiplier, model, optimizer, train

model = distill(student=model, stages=shared_kd_stages(ONE_STAGE_WEIGHT), **_teacher)
