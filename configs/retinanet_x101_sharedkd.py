"""RetinaNet X101 -> R50, 2x: the published weight study; train the teacher first, see its config."""

from detectron2.config import LazyCall as L

from sharedkd import FrozenTeacher, SharedKD
from sharedkd.config import shared_kd_stages

from .retinanet_plain import dataloader, lr_multiplier, model, optimizer, train

model = L(SharedKD)(
    student=model,
    teacher=L(FrozenTeacher)(config="output/retinanet_x101"),
    stages=shared_kd_stages(),
    input_format="${dataloader.train.mapper.image_format}",
)
