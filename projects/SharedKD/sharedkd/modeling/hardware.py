"""The instructions of this machine's CPU."""

import platform

import torch

__all__ = ["has_bfloat16", "trains_channels_last"]


def has_bfloat16() -> bool:
    """Whether convolutions in bfloat16 are faster here than in float32, not many times slower.

    True if PyTorch cannot tell.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)())
    # PyTorch also calls bfloat16 supported where AVX-512 only emulates it.
    kinds = [getattr(torch.cpu, f"_is_{x}_supported", None) for x in ("avx512_bf16", "amx_tile")]
    return None in kinds or any(ask() for ask in kinds)


def trains_channels_last() -> bool:
    """Whether a training step is faster here with channels last in memory.

    With AVX2 alone it is not: a convolution's gradient by its weight takes longer that way.
    ``tools/benchmark.py --variant train.channels_last=False`` measures it.
    """
    return torch.backends.cpu.get_cpu_capability() != "AVX2"
