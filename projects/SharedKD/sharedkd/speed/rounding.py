"""A frozen network in 16 bits, on a CPU that has no instructions for it."""

from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["round_layers"]

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


@torch.no_grad()
def round_layers(module: nn.Module, dtype: torch.dtype) -> int:
    """Convolutions and linear layers compute in float32, and round what they read and write.

    Instructions for 16 bits do just that: they multiply rounded numbers, sum the products in float32
    and round the sum.  PyTorch without them does it too, but many times slower than in float32.

    Args:
        module: a frozen network; its layers are changed in place.  A convolution that applies a norm
            before it returns is left as it is: with the instructions its sum is rounded in between.
        dtype: ``torch.bfloat16``.

    Returns:
        how many layers compute so.
    """
    layers = [
        m for m in module.modules() if isinstance(m, LAYERS) and getattr(m, "norm", None) is None
    ]
    for layer in layers:
        layer.to(dtype).float()
        layer.forward = partial(_forward, layer, dtype)
    return len(layers)


def _forward(layer: nn.Module, dtype: torch.dtype, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return type(layer).forward(layer, x.to(dtype).float()).to(dtype)
