"""Own COCO-format data: the ResNet-18 Faster R-CNN, distilled by Shared-KD from custom_coco_teacher.py's run."""

from detectron2.config import LazyCall as L

from sharedkd import FrozenTeacher, SharedKD
from sharedkd.config import shared_kd_stages

from .custom_coco_plain import data, dataloader, lr_multiplier, model, optimizer, train

model = L(SharedKD)(
    student=model,
    teacher=L(FrozenTeacher)(config="output/teacher"),
    stages=shared_kd_stages(),
    input_format="${dataloader.train.mapper.image_format}",
)
train.inherit = ["neck", "head"]  # starts with the teacher's FPN and heads
