"""Two teachers in sequence, the nearer one first."""

from detectron2.config import LazyCall as L

from sharedkd import FrozenTeacher
from sharedkd.config import sequence

from ..custom_coco import data, dataloader, lr_multiplier, model, optimizer, train

model.teachers = dict(near=L(FrozenTeacher)(config="output/near"))
model.stages = sequence(model.stages, ["near", None])
