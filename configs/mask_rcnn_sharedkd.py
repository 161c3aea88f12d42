"""Mask R-CNN X101 -> Mask R-CNN R50, 2x; the teacher and its weights come from the model zoo."""

from sharedkd.config import distill

from .mask_rcnn_plain import dataloader, lr_multiplier, model, optimizer, train

model = distill(
    student=model, teacher="COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml"
)
