"""RetinaNet R101 -> R50, 2x; the teacher and its weights come from the model zoo."""

from detectron2.config import LazyCall as L

from sharedkd import FrozenTeacher, SharedKD
from sharedkd.config import shared_kd_stages

from .retinanet_plain import dataloader, lr_multiplier, model, optimizer, train

model = L(SharedKD)(
    student=model,
    teacher=L(FrozenTeacher)(config="COCO-Detection/retinanet_R_101_FPN_3x.yaml"),
    stages=shared_kd_stages(),
    input_format="${dataloader.train.mapper.image_format}",
)
