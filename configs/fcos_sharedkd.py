"""FCOS R101 -> R50, 2x; train the teacher first, see its config: the model zoo has no weights."""

from detectron2.config import LazyCall as L

from sharedkd import FrozenTeacher, SharedKD
from sharedkd.config import shared_kd_stages

from .fcos_plain import dataloader, lr_multiplier, model, optimizer, train

model = L(SharedKD)(
    student=model,
    teacher=L(FrozenTeacher)(config="output/fcos_r101"),
    stages=shared_kd_stages(),
    input_format="${dataloader.train.mapper.image_format}",
)
