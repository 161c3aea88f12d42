"""The base class of teachers: sources of feature maps that stages learn from."""

from abc import ABC, abstractmethod
from typing import Any, Callable, Dict, FrozenSet, List, Optional, Tuple

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn

from sharedkd.losses.base import Maps, Shapes
from sharedkd.modeling.heads import Hidden

__all__ = ["Teacher", "teacher_key"]


class Teacher(ABC):
    """A source of feature maps.

    It is no ``nn.Module``: its parameters are not among the ``modules()``, ``parameters()`` or
    ``state_dict()`` of the model that holds it, and not in DDP or the optimizer.  ``train()`` does not
    reach it.

    A subclass defines :attr:`shapes` and :meth:`features`.

    Attributes:
        shapes: tap -> stride -> channels of the maps that it offers.
    """

    shapes: Shapes

    @abstractmethod
    def features(
        self,
        batched_inputs: List[Dict[str, Any]],
        taps: FrozenSet[str],
        input_format: str = "BGR",
        size_divisibility: int = 0,
    ) -> Maps:
        """Compute its maps of the student's images.

        Args:
            batched_inputs: Detectron2's records; ``image`` is a (C, H, W) tensor.
            taps: which maps to return, see :data:`~sharedkd.losses.base.TAPS`.
            input_format: the channel order of the images.
            size_divisibility: the student's, for a source that has no padding of its own.

        Returns:
            tap -> stride -> (N, C, H, W), without gradient.
        """

    def attach(self, student: nn.Module, input_format: str, pyramid: Optional[str] = None) -> None:
        """Take the student that learns from it, before its :attr:`shapes` are read.

        Args:
            student: the plain detector.
            input_format: the channel order of its images.
            pyramid: the name of the module whose outputs are its pyramid; None: its ``backbone``.
        """

    def begin_step(self) -> None:
        """Called at the start of every training step, also of those in which no stage reads it."""

    def check_images(self, channels: int, input_format: str) -> None:
        """Check that it can be shown the images of the data loader.

        Args:
            channels, input_format: of the images.

        Raises:
            ConfigError: it cannot.
        """

    def region_predictions(self, maps: Maps, boxes: List[Boxes]) -> Tuple[Tensor, Tensor]:
        """Compute its class logits and box deltas of given regions.

        Args:
            maps: of :meth:`features`, with the tap ``fpn``.
            boxes: the regions of each image, in pixels.

        Returns:
            see :func:`~sharedkd.modeling.heads.region_predictions`; without gradient.

        Raises:
            NotImplementedError: it has no box head.
        """
        raise NotImplementedError(f"{type(self).__name__} has no box head")

    def finish_regions(self, hidden: Hidden, left: int) -> Tuple[Tensor, Tensor]:
        """Run the rest of its box head on the student's features, see :func:`~sharedkd.modeling.heads.finish_regions`.

        Raises:
            NotImplementedError: it has no box head.
        """
        raise NotImplementedError(f"{type(self).__name__} has no box head")

    def finish_head(self, hidden: Hidden, left: int) -> Maps:
        """Run the rest of its dense head on maps of the student's, see :func:`~sharedkd.modeling.heads.finish_head`.

        Raises:
            NotImplementedError: it has no dense head.
        """
        raise NotImplementedError(f"{type(self).__name__} has no dense head")

    @property
    def detector(self) -> Optional[nn.Module]:
        """The detector whose heads a loss may read; None if there is none."""
        return None

    @property
    def about(self) -> str:
        """What it is, in words, if it is no trained detector."""
        return type(self).__name__

    @property
    def fingerprint(self) -> Optional[str]:
        """Identifies this teacher when a run is resumed; None: its weights are not fixed."""
        return None

    def prepare(self, step_dtype: Optional[torch.dtype] = None) -> Dict[int, float]:
        """Make it ready to run; called once, when the model is on its device.

        Args:
            step_dtype: what the training step computes in under autocast; None: float32.

        Returns:
            stride -> relative change of its maps, see :meth:`FrozenTeacher.prepare`; empty: none.
        """
        return {}

    def apply_to_tensors(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply ``fn`` to its tensors, when the model that holds it moves to a device or type."""


def teacher_key(name: Optional[str], model: str = "model") -> str:
    """The config key of a teacher of ``model`` by its name; None: ``model.teacher``."""
    return f"{model}.teacher" if name is None else f"{model}.teachers.{name}"
