"""The average of the student over its training, as a source of maps."""

import copy
from contextlib import suppress
from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Tuple

import torch
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from sharedkd.losses.base import Maps
from sharedkd.modeling.heads import Hidden
from sharedkd.modeling.taps import pyramid_shapes
from sharedkd.values import check_number, check_switch

from .base import Teacher
from .frozen import FrozenTeacher

__all__ = ["StudentAverage"]


class StudentAverage(Teacher):
    """An exponential average of the student's weights, which teaches the student (mean teacher).

    Mean teachers are better role models (NeurIPS 2017)::

        average = d average + (1 - d) student,   d = min(decay, (1 + step) / (10 + step))

    at the start of each iteration, of the EventStorage: whatever trainer and optimizer made the last step.
    The growing d of the first steps is our choice.  Buffers, such as the statistics of batch norms, are
    copied.  It begins as the student of the first iteration.

    Args:
        decay: between 0 and 1.
        final: at the end of a run of :class:`~sharedkd.SharedKDTrainer` the average is the student: of the
            last evaluation, and in ``model_final.pth``.

    Raises:
        ConfigError: a decay out of bounds, or ``final`` is no switch.
    """

    def __init__(self, decay: float = 0.999, final: bool = False):
        check_number("decay", decay, least=0, most=1)
        check_switch("final", final)
        self.decay, self.final, self.steps = decay, final, 0
        self._student: Optional[nn.Module] = None
        self._inner: Optional[FrozenTeacher] = None
        self.iteration: Optional[int] = None  #: of its last update; None: not begun

    def attach(self, student: nn.Module, input_format: str, pyramid: Optional[str] = None) -> None:
        """Take the student, and the channel order of its images."""
        self._student, self._format, self._place = student, input_format, pyramid
        self.shapes = pyramid_shapes(student, pyramid)

    def prepare(self, step_dtype: Optional[torch.dtype] = None) -> Dict[int, float]:
        """Copy the student's modules, before anything rewires them; the weights follow at the first update."""
        model = copy.deepcopy(self._student)
        self._inner = FrozenTeacher(model, "", self._format, fold=False, pyramid=self._place)
        return {}

    @property
    def detector(self) -> Optional[nn.Module]:
        return self._student if self._inner is None else self._inner.detector

    def features(
        self,
        batched_inputs: List[Dict[str, Any]],
        taps: FrozenSet[str],
        input_format: str = "BGR",
        size_divisibility: int = 0,
    ) -> Maps:
        return self._inner.features(batched_inputs, taps, input_format, size_divisibility)

    def region_predictions(self, maps: Maps, boxes: List[Any]) -> Tuple[Tensor, Tensor]:
        return self._inner.region_predictions(maps, boxes)

    def finish_regions(self, hidden: Hidden, left: int) -> Tuple[Tensor, Tensor]:
        return self._inner.finish_regions(hidden, left)

    def finish_head(self, hidden: Hidden, left: int) -> Maps:
        return self._inner.finish_head(hidden, left)

    @property
    def about(self) -> str:
        return f"the average of the student, decay {self.decay:g}"

    @torch.no_grad()
    def begin_step(self) -> None:
        """Take in the last step, once in each iteration."""
        if self._inner is None:
            self.prepare()
        first = self.iteration is None
        iteration = -1 if first else self.iteration
        with suppress(AssertionError):  # outside of a training there is none
            iteration = get_event_storage().iter
        if iteration == self.iteration:
            return
        self.iteration = iteration
        decay = 0.0 if first else min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 0 if first else 1
        theirs = self._student.state_dict()
        trained = {name for name, _ in self._student.named_parameters()}
        for name, average in self._inner.model.state_dict().items():
            if name in trained:
                average.lerp_(theirs[name].to(average.dtype), 1 - decay)
            else:
                average.copy_(theirs[name])

    def state_dict(self) -> Dict[str, Any]:
        """The averaged detector, with plain Detectron2's names, and how many steps it is the average of."""
        averaged = self._student if self.iteration is None else self._inner.model
        return {
            "model": averaged.state_dict(),
            "steps": self.steps,
            "iteration": self.iteration,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the average of a resumed run, whose student is loaded already."""
        if self._inner is None:
            self.prepare()
        self._inner.model.load_state_dict(state["model"])
        self.steps, self.iteration = state["steps"], state.get("iteration", -1)  # of older runs
