"""What losses on the outputs of the dense head share."""

import torch
from torch import Tensor

from .base import Batch

__all__ = ["foreground", "giou", "number_of_foreground", "on_images"]

EPS = 1e-6  # least area in square pixels


def foreground(batch: Batch, stride: int, classes: int) -> Tensor:
    """Which anchors of a level have the label of one of ``classes`` classes, (N, A, H, W)."""
    labels = batch.labels[stride]
    return (labels >= 0) & (labels < classes)


def number_of_foreground(batch: Batch, classes: int) -> Tensor:
    """The foreground anchors of all levels of a batch, at least 1."""
    return sum(foreground(batch, s, classes).sum() for s in batch.labels).clamp(min=1)


def on_images(batch: Batch, stride: int) -> Tensor:
    """Which anchors of a level do not lie on padding, (N, A or 1, H, W)."""
    labels = batch.labels[stride]
    inside = batch.inside(labels, stride)
    return torch.ones_like(labels, dtype=torch.bool) if inside is None else inside


def giou(a: Tensor, b: Tensor) -> Tensor:
    """The generalised IoU (CVPR 2019) of boxes (N, A*4, H, W), XYXY, one by one: (N, A, H, W).

    torchvision's indexes by booleans, for which a GPU is waited for.
    """

    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp(min=0).prod(2)

    (a0, a1), (b0, b1) = (x.unflatten(1, (-1, 4)).split(2, 2) for x in (a, b))
    both = area(torch.maximum(a0, b0), torch.minimum(a1, b1))
    either = (area(a0, a1) + area(b0, b1) - both).clamp(min=EPS)
    around = area(torch.minimum(a0, b0), torch.maximum(a1, b1)).clamp(min=EPS)
    return both / either - (around - either) / around
