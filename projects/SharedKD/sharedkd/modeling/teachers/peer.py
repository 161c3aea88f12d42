"""Students that train together: what a peer is, and its maps as a source for the others."""

from dataclasses import dataclass, field
from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Tuple

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn

from sharedkd.losses.base import Maps, precise
from sharedkd.modeling.heads import region_predictions
from sharedkd.modeling.taps import FeatureTap
from sharedkd.values import check_number

from .base import Teacher

__all__ = ["Peer", "StudentMaps"]


@dataclass
class Peer:
    """A further student, which trains beside the first one; each may learn from the other.

    Deep Mutual Learning (CVPR 2018) trains networks together that learn from each other's class scores;
    that it may be any loss of maps is ours.

    Args:
        student: any plain detector, trained by its own losses and its stages.
        stages: name -> :class:`~sharedkd.modeling.stages.Stage`.  One that names no teacher learns from
            the first student; it may name another peer.
        lr_factor: its learning rate over ``optimizer.lr``.
        init_checkpoint: its initial weights, as ``train.init_checkpoint`` is those of the first student.
        sha256: of that file, verified; at least 8 hexadecimal digits.
        trust_checkpoint: let that file run what it asks for while it is read.
        pyramid: the name of the module whose outputs are its pyramid, such as ``neck``; None: its
            ``backbone``.

    Raises:
        ConfigError: a factor that is no number above 0.
    """

    student: nn.Module
    stages: Mapping[str, Any] = field(default_factory=dict)
    lr_factor: float = 1.0
    init_checkpoint: str = ""
    sha256: str = ""
    trust_checkpoint: bool = False
    pyramid: Optional[str] = None

    def __post_init__(self) -> None:
        check_number("lr_factor", self.lr_factor, above=0)


class StudentMaps(Teacher):
    """The maps of a student that trains in the same step, without gradient.

    The student runs once a step, by its own forward; its maps then go to all who asked for them before.

    Args:
        student: the plain detector.
        tap: captures its maps.
        pyramid: the name of the module whose outputs are its pyramid; None: its ``backbone``.
    """

    weights = "trained in this run"

    def __init__(self, student: nn.Module, tap: FeatureTap, pyramid: Optional[str] = None):
        self._student, self.shapes, self.pyramid = student, tap.shapes, pyramid
        self._asked: List[Tuple[FrozenSet[str], Maps]] = []

    def features(
        self,
        batched_inputs: List[Dict[str, Any]],
        taps: FrozenSet[str],
        input_format: str = "BGR",
        size_divisibility: int = 0,
    ) -> Maps:
        """Ask for its maps of this step: the dict that is returned is filled when it has run."""
        maps: Maps = {}
        self._asked.append((taps, maps))
        return maps

    @property
    def wanted(self) -> FrozenSet[str]:
        """The taps that were asked for in this step."""
        return frozenset().union(*(taps for taps, _ in self._asked))

    def give(self, maps: Maps) -> None:
        """Give the maps of the student's forward, at the taps :attr:`wanted`, to all who asked."""
        for taps, asked in self._asked:
            for tap in taps:
                asked[tap] = {stride: x.detach() for stride, x in maps[tap].items()}
        self._asked = []

    @property
    def detector(self) -> nn.Module:
        return self._student

    @torch.no_grad()
    def region_predictions(self, maps: Maps, boxes: List[Boxes]) -> Tuple[Tensor, Tensor]:
        modes = {x: x.training for x in self._student.roi_heads.modules()}
        self._student.roi_heads.eval()  # its statistics are those of its own regions
        try:
            fpn = {stride: precise(x) for stride, x in maps["fpn"].items()}
            return region_predictions(self._student, fpn, boxes)
        finally:
            for module, training in modes.items():
                module.training = training
