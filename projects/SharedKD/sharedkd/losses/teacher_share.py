"""The teacher share module: what the student is shown at a level."""

from typing import Dict

import torch
from torch import Tensor

from .alignment import pool_to
from .base import precise

__all__ = ["SHARES", "shared_target"]

SHARES = ("dense", "adjacent", "none")


def shared_target(maps: Dict[int, Tensor], stride: int, share: str = "dense") -> Tensor:
    """The teacher's target of one level: its own map averaged with its lower levels' maps.

    Shared Knowledge Distillation (Electronics 2024, 13(8), 1595), teacher knowledge augmentation::

        T~_l = mean over k in {l and all lower levels} of align(T_k -> T_l)

    Our reading: a plain mean.  Lower levels of a bottom-up network are narrower; a map that has no
    channel c does not take part in the mean of channel c, so that T~_l keeps the width of T_l.

    Args:
        maps: stride -> (N, C, H, W), the teacher's pyramid.
        stride: the level l.
        share: ``dense`` (all lower levels), ``adjacent`` (the next lower one), ``none`` (T~_l = T_l).

    Returns:
        (N, C_l, H_l, W_l), in float32 at least; with ``none`` the map itself.
    """
    own = maps[stride]
    lower = sorted(k for k in maps if k < stride)
    lower = {"dense": lower, "adjacent": lower[-1:], "none": []}[share]
    if not lower:
        return own
    size, width = own.shape[-2:], own.shape[1]
    total = precise(own).clone()
    count = total.new_ones(width)
    for k in lower:
        channels = min(width, maps[k].shape[1])
        total[:, :channels] += pool_to(precise(maps[k][:, :channels]), size)
        count[:channels] += 1
    return total / count.view(1, -1, 1, 1)
