"""What a distillation loss is: maps in, named scalars out.  A new loss is one file with one subclass."""

import logging
from dataclasses import dataclass, field
from typing import Any, Dict, FrozenSet, List, Optional, Tuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError

__all__ = ["TAPS", "Shapes", "Maps", "Batch", "DistillationLoss"]

logger = logging.getLogger("detectron2.sharedkd")

TAPS = ("fpn", "backbone")  #: where maps are taken: the backbone's outputs, or its bottom-up stages

Shapes = Dict[str, Dict[int, int]]  #: tap -> stride -> channels
Maps = Dict[str, Dict[int, Tensor]]  #: tap -> stride -> map (N, C, H, W)


@dataclass
class Batch:
    """Everything a loss may look at in one step.

    Attributes:
        student: the student's maps, attached to its graph.
        teacher: the teacher's maps of the same image regions, without gradient; None when no active
            loss needs a teacher.
        image_sizes: (height, width) of each image in pixels, before padding.
        inputs: the data loader's records, with ``instances`` (ground truth).
    """

    student: Maps
    teacher: Optional[Maps]
    image_sizes: List[Tuple[int, int]]
    inputs: List[Dict[str, Any]] = field(default_factory=list)

    def inside(self, x: Tensor, stride: int) -> Optional[Tensor]:
        """Where a map's positions lie on their image and not on its padding.

        Args:
            x: (N, C, H, W) map of the given stride.

        Returns:
            (N, 1, H, W) bool tensor; None when nothing is padding.
        """
        height, width = x.shape[-2:]
        sizes = [(-(-h // stride), -(-w // stride)) for h, w in self.image_sizes]
        if all(h >= height and w >= width for h, w in sizes):
            return None
        h, w = torch.tensor(sizes, device=x.device).view(-1, 2, 1, 1).unbind(1)
        rows = torch.arange(height, device=x.device).view(1, -1, 1) < h
        columns = torch.arange(width, device=x.device).view(1, 1, -1) < w
        return (rows & columns).unsqueeze(1)


class DistillationLoss(nn.Module):
    """Base of all distillation losses.

    A subclass says in ``needs`` what it reads besides the student's maps, in ``taps`` where it takes
    them, checks both pyramids in :meth:`bind` (where it may also create parameters), and returns one
    named scalar per level from :meth:`forward`.

    Example of a config line::

        model.stages.my_loss = L(Stage)(loss=L(MyLoss)(tap="fpn"), weight=1.0)
    """

    needs: FrozenSet[str] = frozenset({"teacher"})

    def __init__(self, tap: str = "fpn", strides: Optional[List[int]] = None):
        """
        Args:
            tap: ``fpn`` or ``backbone``.
            strides: the levels to use, by stride; None uses every level there is.

        Raises:
            ConfigError: unknown tap.
        """
        super().__init__()
        if tap not in TAPS:
            raise ConfigError("tap", tap, "no such tap", f"use one of {', '.join(TAPS)}")
        self.tap = tap
        self.strides = None if strides is None else sorted(int(s) for s in strides)

    @property
    def taps(self) -> FrozenSet[str]:
        return frozenset({self.tap})

    def bind(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        """Settle which levels are used, once, when the pair is built.

        Args:
            student, teacher: the channels of every level of both pyramids.
            key: this loss's place in the config, for messages.

        Raises:
            ConfigError: the levels asked for are not there, or no level is left.
        """
        ours = there = set(self._levels(student, "student", key))
        if "teacher" in self.needs:
            there = set(self._levels(teacher, "teacher", key))
        levels = ours & there
        if self.strides is not None:
            missing = sorted(set(self.strides) - levels)
            if missing:
                raise ConfigError(
                    f"{key}.strides",
                    self.strides,
                    f"no level of stride {missing} on the {self.tap} tap, usable are {sorted(levels)}",
                    "leave out these strides",
                )
            levels &= set(self.strides)
        if not levels:
            theirs = f" and teacher levels {sorted(there)}" if "teacher" in self.needs else ""
            raise ConfigError(
                key,
                type(self).__name__,
                f"student levels {sorted(ours)}{theirs} on the {self.tap} tap have no stride in common "
                f"with strides={self.strides}",
                "choose another tap, other strides or another teacher",
            )
        alone = sorted((ours | there) - levels)
        if alone:
            logger.info(f"{key}: levels of stride {alone} on the {self.tap} tap have no part in it")
        self.strides = sorted(levels)

    def _levels(self, shapes: Optional[Shapes], who: str, key: str) -> Dict[int, int]:
        if shapes is None:
            raise ConfigError(
                key,
                type(self).__name__,
                "needs a teacher, and model.teacher is not set",
                "set model.teacher or remove this stage",
            )
        if not shapes.get(self.tap):
            raise ConfigError(
                f"{key}.tap",
                self.tap,
                f"the {who} has no such maps, only {sorted(shapes)}",
                "use another tap",
            )
        return shapes[self.tap]

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        """
        Returns:
            term name (``s8``: the level of stride 8) -> scalar float32 tensor, unweighted.
        """
        raise NotImplementedError
