"""Identical-layer distillation: teacher to student, level by level."""

from typing import Dict, List, Optional

import torch
from torch import Tensor

from sharedkd.values import check_choice

from .alignment import align
from .base import Batch, DistillationLoss
from .distance import Distance
from .teacher_share import SHARES, shared_targets

__all__ = ["IdenticalLayer"]


class IdenticalLayer(DistillationLoss):
    """Compares each student level with the teacher's shared target of the same level.

    Shared Knowledge Distillation (Electronics 2024, 13(8), 1595)::

        L_identical = sum_l D(align(S_l), sg(align(T~_l)))

    with the shared targets T~ of :mod:`~sharedkd.losses.teacher_share`.  No parameters.

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
