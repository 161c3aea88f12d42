"""As custom_coco.py, with instance masks: Mask R-CNN."""

from sharedkd.config import distill

from .custom_coco_mask_plain import data, dataloader, lr_multiplier, model, optimizer, train

model = distill(
    student=model,
    teacher="output/teacher/config.yaml",
    weights="output/teacher/model_final.pth",
)
