"""Making two feature maps comparable without a single parameter."""

from typing import Tuple

import torch.nn.functional as F
from torch import Tensor

__all__ = ["align", "pool_to"]


def pool_to(x: Tensor, size: Tuple[int, int]) -> Tensor:
    """Average-pool ``x`` (N, C, H, W) to ``size`` = (h, w) with h <= H and w <= W."""
    if x.shape[-2:] == size:
        return x
    (height, width), (h, w) = x.shape[-2:], size
    if (
        height % h == 0 and width % w == 0
    ):  # the same numbers as adaptive pooling, several times faster
        kernel = (height // h, width // w)
        return F.avg_pool2d(x, kernel, kernel)
    return F.adaptive_avg_pool2d(x, size)


def align(x: Tensor, y: Tensor) -> Tuple[Tensor, Tensor]:
    """Bring two maps to one shape: the larger is average-pooled, the wider is cropped.

    Shared Knowledge Distillation (Electronics 2024, 13(8), 1595): "spatial pooling alignment" and
    channel cropping.  No convolution, no upsampling, no learned weight.

    Args:
        x: (N, C1, H1, W1)
        y: (N, C2, H2, W2)

    Returns:
        both maps as (N, min(C1, C2), min(H1, H2), min(W1, W2)); a map that already has that shape is
        returned as it is, and channels are cropped before anything is pooled.
    """
    channels = min(x.shape[1], y.shape[1])
    size = (min(x.shape[2], y.shape[2]), min(x.shape[3], y.shape[3]))
    return pool_to(x[:, :channels], size), pool_to(y[:, :channels], size)
