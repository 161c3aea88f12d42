"""What this machine's CPU has instructions for."""

import torch

__all__ = ["has_bfloat16"]


def has_bfloat16() -> bool:
    """Whether convolutions in bfloat16 are faster here than in float32, not many times slower.

    True also where PyTorch cannot tell.
    """
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return ask is None or bool(ask())
