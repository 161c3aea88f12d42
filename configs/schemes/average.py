"""No other network: the teacher is the moving average of the student."""

from detectron2.config import LazyCall as L

from sharedkd.modeling.teachers import StudentAverage

from ..custom_coco import data, dataloader, lr_multiplier, model, optimizer, train

model.teacher = L(StudentAverage)(decay=0.998)
train.inherit = []  # from no trained teacher
