"""Cross-layer distillation inside the student: its levels learn from each other."""

from itertools import combinations
from typing import Dict, List, Optional, Tuple

from torch import Tensor

from sharedkd.errors import ConfigError
from sharedkd.values import check_choice

from .alignment import Pooled, align
from .base import Batch, DistillationLoss, Shapes, logger
from .distance import Distance

__all__ = ["CrossLayer"]

PAIRS = ("dense", "adjacent")
DIRECTIONS = ("deep_to_shallow", "shallow_to_deep", "mutual")


class CrossLayer(DistillationLoss):
    """Compares the levels of the student with each other.

    It is the second half of the way from teacher level k to student level l: student k to student l.

    Shared Knowledge Distillation (Electronics 2024, 13(8), 1595)::

        L_cross = sum over pairs (l, k), l shallower than k, of D(align(S_l, S_k), sg(...))

    Our reading: ``deep_to_shallow`` takes the deeper map as the detached target,
    ``shallow_to_deep`` the shallower, ``mutual`` is the sum of both.  Reads no teacher; alone it is
    teacher-free self-distillation.  No parameters.

    Example::

        model.stages.cross = L(Stage)(loss=L(CrossLayer)(tap="backbone"), weight=2.0)

    Args:
        tap, strides: see :class:`DistillationLoss`; at least two levels, or None: of a student with a
            single level the stage is then left out, with a warning.
        pairs: ``dense`` (every two levels) or ``adjacent`` (neighbours).
        direction: ``mutual``, ``deep_to_shallow`` or ``shallow_to_deep``.
        distance, normalize, ignore_padding: see :class:`IdenticalLayer`.

    Raises:
        ConfigError: unknown name.
    """

    needs = frozenset()

    def __init__(
        self,
        tap: str = "fpn",
        strides: Optional[List[int]] = None,
        pairs: str = "dense",
        direction: str = "mutual",
        distance: str = "mse",
        normalize: str = "none",
        ignore_padding: bool = True,
    ):
        super().__init__(tap, strides)
        check_choice("pairs", pairs, PAIRS)
        check_choice("direction", direction, DIRECTIONS)
        self.pairs = pairs
        self.direction = direction
        self.distance = Distance(distance, normalize)
        self.ignore_padding = ignore_padding

    def bind(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        every = self.strides is None
        super().bind(student, teacher, key)
        self.idle = every and len(self.strides) < 2
        if self.idle:
            logger.warning(
                f"{key}: the student has one level on the {self.tap} tap, and there is no pair to compare: "
                "the stage is left out"
            )
        elif len(self.strides) < 2:
            raise ConfigError(
                f"{key}.strides",
                self.strides,
                "cross-layer distillation pairs up levels",
                "name at least two strides",
            )

    def level_pairs(self) -> List[Tuple[int, int]]:
        """(shallower stride, deeper stride) of every pair, after :meth:`bind`."""
        if self.pairs == "dense":
            return list(combinations(self.strides, 2))
        return list(zip(self.strides, self.strides[1:]))

    def aligned(self, stride: int, student: Optional[int], teacher: Optional[int]) -> str:
        deeper = [str(deep) for shallow, deep in self.level_pairs() if shallow == stride]
        how = f"pooled to strides {', '.join(deeper)}" if deeper else "at its own size"
        return f"student's {how}, cropped to the narrower"

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        maps = batch.student[self.tap]
        learning = {stride: Pooled(maps[stride]) for stride in self.strides}
        fixed = {stride: Pooled(pool.x.detach()) for stride, pool in learning.items()}
        terms = {}
        for shallow, deep in self.level_pairs():
            s = (fixed if self.direction == "shallow_to_deep" else learning)[shallow]
            d = (fixed if self.direction == "deep_to_shallow" else learning)[deep]
            s, d = align(s, d)
            mask = batch.inside(d, deep) if self.ignore_padding else None
            term = self.distance(s, d, mask)
            if self.direction == "mutual":
                # D(s, sg(d)) + D(sg(s), d) has the gradient of D(s, d) and twice its value.
                term = term + term.detach()
            terms[f"s{shallow}_s{deep}"] = term
        return terms
