"""The memory format of a detector's weights."""

import torch
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from torch import nn

__all__ = ["keep_keypoints_contiguous"]


def keep_keypoints_contiguous(model: nn.Module) -> None:
    """Return the weights of a model's keypoint heads to the contiguous format, if it has any.

    Detectron2's keypoint loss and inference call ``view`` on the heatmaps, which channels last does not
    allow.  RoIAlign's output is contiguous, and with such weights so is all that follows.
    """
    for module in model.modules():
        if isinstance(module, BaseKeypointRCNNHead):
            module.to(memory_format=torch.contiguous_format)
