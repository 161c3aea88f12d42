"""The teacher share module: the teacher's target of each level."""

from typing import Dict, Iterable

import torch
from torch import Tensor

from .alignment import Pooled
from .base import precise, precision

__all__ = ["SHARES", "shared_targets"]

SHARES = ("dense", "adjacent", "none")


def shared_targets(
    maps: Dict[int, Tensor], strides: Iterable[int], share: str = "dense"
) -> Dict[int, Tensor]:
    """The teacher's target of each level: its own map averaged with its lower levels' maps.

    Shared Knowledge Distillation (Electronics 2024, 13(8), 1595), teacher knowledge augmentation::

        T~_l = mean over k in {l and all lower levels} of align(T_k -> T_l)

    Our reading: a plain mean.  Lower levels of a bottom-up network are narrower; a map that has no
    channel c does not take part in the mean of channel c, so that T~_l keeps the width of T_l.

    Args:
        maps: stride -> (N, C, H, W), the teacher's pyramid, without gradient.
        strides: the levels l.
        share: ``dense`` (all lower levels), ``adjacent`` (the next lower one), ``none`` (T~_l = T_l).

    Returns:
        stride -> (N, C_l, H_l, W_l), means in float32 at least; a level without lower ones, or with
        ``none`` every level, is the map itself.

    >>> import torch
    >>> maps = {8: torch.full((1, 1, 4, 4), 2.0), 16: torch.full((1, 2, 2, 2), 4.0)}
    >>> shared_targets(maps, [8, 16])[16].mean((0, 2, 3)).tolist()  # no second channel at stride 8
    [3.0, 4.0]
    """
    pools = {stride: Pooled(x) for stride, x in maps.items()}
    return {stride: _target(pools, stride, share) for stride in strides}


def _target(pools: Dict[int, Pooled], stride: int, share: str) -> Tensor:
    own = pools[stride].x
    lower = sorted(k for k in pools if k < stride)
    lower = {"dense": lower, "adjacent": lower[-1:], "none": []}[share]
    if not lower:
        return own
    maps = [own, *(pools[k].to(own.shape[-2:]) for k in lower)]
    ends = sorted({min(x.shape[1], own.shape[1]) for x in maps})
    means = torch.empty_like(own, dtype=precision(own))
    for start, end in zip([0, *ends], ends):
        some = [x[:, start:end] for x in maps if x.shape[1] >= end]
        total = means[:, start:end]
        if len(some) == 1:
            total.copy_(some[0])
            continue
        torch.add(some[0], precise(some[1]), out=total)
        for x in some[2:]:
            total += x
        total /= len(some)
    return means
