"""Identical-layer distillation: teacher to student, level by level."""

from typing import Dict, Iterable, List, Optional

import torch
from torch import Tensor

from sharedkd.values import check_choice

from .alignment import Pooled, align
from .base import Batch, DistillationLoss, precise, precision
from .distance import Distance

__all__ = ["SHARES", "IdenticalLayer", "shared_targets"]

SHARES = ("dense", "adjacent", "none")


class IdenticalLayer(DistillationLoss):
    """Compares each student level with the teacher's shared target of the same level.

    Shared Knowledge Distillation (Electronics 2024, 13(8), 1595)::

        L_identical = sum_l D(align(S_l), sg(align(T~_l)))

    with the shared targets T~ of :func:`shared_targets`.  No parameters.

    Example::

        model.stages.identical = L(Stage)(loss=L(IdenticalLayer)(share="dense"), weight=2.0)

    Args:
        tap, strides: see :class:`DistillationLoss`.
        share: ``dense``, ``adjacent`` or ``none``.
        distance: ``mse``, ``l1``, ``smooth_l1``, ``cosine``.
        normalize: ``none`` (as published), ``channel``, ``instance``, ``position``.
        ignore_padding: leave positions on the batch's padding out of the distance.

    Raises:
        ConfigError: unknown name.
    """

    def __init__(
        self,
        tap: str = "fpn",
        strides: Optional[List[int]] = None,
        share: str = "dense",
        distance: str = "mse",
        normalize: str = "none",
        ignore_padding: bool = True,
    ):
        super().__init__(tap, strides)
        check_choice("share", share, SHARES)
        self.share = share
        self.distance = Distance(distance, normalize)
        self.ignore_padding = ignore_padding

    def aligned(self, stride: int, student: Optional[int], teacher: Optional[int]) -> str:
        finer = {"dense": "all finer levels", "adjacent": "the next finer level"}.get(self.share)
        words = [f"teacher's is its mean with {finer}, pooled"] if finer else []
        if student != teacher:
            who = "student's" if student > teacher else "teacher's"
            words.append(f"{who} is cropped to {min(student, teacher)} channels")
        return ", ".join(words) or "as they are"

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        # A mean is one of each channel: those that the student does not have need none.
        width = max(batch.student[self.tap][stride].shape[1] for stride in self.strides)
        maps = {stride: _crop(x.detach(), width) for stride, x in batch.teacher[self.tap].items()}
        targets = shared_targets(maps, self.strides, self.share)
        terms = {}
        for stride in self.strides:
            s, t = align(batch.student[self.tap][stride], targets[stride])
            mask = batch.inside(s, stride) if self.ignore_padding else None
            terms[f"s{stride}"] = self.distance(s, t, mask)
        return terms


def _crop(x: Tensor, width: int) -> Tensor:
    """The first ``width`` channels.

    With channels last these lie apart: copied once here, not anew by everything that reads them.
    """
    crop = x[:, :width]
    last = torch.channels_last
    return crop.contiguous(memory_format=last) if x.is_contiguous(memory_format=last) else crop


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
