"""RetinaNet R101 -> R50, 2x; the teacher and its weights come from the model zoo."""

from sharedkd.config import ONE_STAGE_WEIGHT, distill, shared_kd_stages

from .retinanet_plain import dataloader, lr_multiplier, model, optimizer, train

model = distill(
    student=model,
    teacher="COCO-Detection/retinanet_R_101_FPN_3x.yaml",
    stages=shared_kd_stages(ONE_STAGE_WEIGHT),
)
