"""Two teachers at once: that of custom_coco.py, and one nearer to the student."""

from detectron2.config import LazyCall as L

from sharedkd import FrozenTeacher
from sharedkd.config import shared_kd_stages

from ..custom_coco import data, dataloader, lr_multiplier, model, optimizer, train

model.teachers = dict(near=L(FrozenTeacher)(config="output/near"))
model.stages.near = {**shared_kd_stages().identical, "teacher": "near"}
