"""Several teachers as one source of maps: the mean of their normalised maps."""

from typing import Any, Callable, Dict, FrozenSet, List, Optional, Sequence

import torch
from torch import Tensor

from sharedkd.errors import ConfigError
from sharedkd.losses.base import Maps, precise
from sharedkd.losses.distance import NORMALIZATIONS
from sharedkd.values import check_number

from .base import Teacher

__all__ = ["TeacherMean"]


class TeacherMean(Teacher):
    """The weighted mean of several teachers' maps.

    Maps of different networks differ in scale, so each is normalised before: zero mean and unit variance
    per image and channel.  One teacher alone is left as it is.  Where the teachers' canvases differ, the
    mean is of the pixels that all of them show.

    Args:
        teachers: sources of maps; the mean has the levels that all offer with the same width.
        weights: one for each, relative to their sum; None: all alike.

    Raises:
        ConfigError: no teachers, one that takes its maps from the student, other than one positive weight for
            each, or no level in common.
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Optional[Sequence[float]] = None):
        self.teachers = list(teachers)
        if not self.teachers:
            raise ConfigError("teachers", [], "is empty", "name at least one teacher")
        for teacher in self.teachers:
            if not hasattr(teacher, "shapes"):  # it takes them from the student
                fix = "name frozen teachers, and learn from it in a stage of its own"
                raise ConfigError("teachers", type(teacher).__name__, "has no maps of its own", fix)
        given = [1.0] * len(self.teachers) if weights is None else list(weights)
        if len(given) != len(self.teachers):
            fix = "give each teacher one"
            raise ConfigError("weights", given, f"is for {len(self.teachers)} teachers", fix)
        for x in given:
            check_number("weights", x, above=0)
        self.parts = [x / sum(given) for x in given]
        first, *others = (teacher.shapes for teacher in self.teachers)
        self.shapes = {
            tap: {
                stride: channels
                for stride, channels in first.get(tap, {}).items()
                if all(x.get(tap, {}).get(stride) == channels for x in others)
            }
            for tap in ("fpn", "backbone")
        }
        if not any(self.shapes.values()):
            problem, fix = "have no level of the same width", "use one stage for each teacher"
            raise ConfigError("teachers", [x.get("fpn") for x in (first, *others)], problem, fix)

    @torch.no_grad()
    def features(
        self,
        batched_inputs: List[Dict[str, Any]],
        taps: FrozenSet[str],
        input_format: str = "BGR",
        size_divisibility: int = 0,
    ) -> Maps:
        each = [
            x.features(batched_inputs, taps, input_format, size_divisibility) for x in self.teachers
        ]
        if len(each) == 1:
            return each[0]
        return {
            tap: {stride: self._mean([maps[tap][stride] for maps in each]) for stride in levels}
            for tap, levels in self.shapes.items()
            if tap in taps
        }

    def _mean(self, maps: Sequence[Tensor]) -> Tensor:
        height, width = (min(x.shape[i] for x in maps) for i in (2, 3))
        normalise = NORMALIZATIONS["instance"]
        common = (normalise(precise(x[..., :height, :width]), None) for x in maps)
        return sum(weight * x for weight, x in zip(self.parts, common))

    def check_images(self, channels: int, input_format: str) -> None:
        for teacher in self.teachers:
            teacher.check_images(channels, input_format)

    @property
    def about(self) -> str:
        return "the mean of " + ", ".join(f"({x.about})" for x in self.teachers)

    @property
    def fingerprint(self) -> Optional[str]:
        return "+".join(str(x.fingerprint) for x in self.teachers)

    def prepare(self, step_dtype: Optional[torch.dtype] = None) -> Dict[int, float]:
        found = [teacher.prepare(step_dtype) for teacher in self.teachers]
        return {stride: max(x.get(stride, 0.0) for x in found) for stride in found[0]}

    def apply_to_tensors(self, fn: Callable[[Tensor], Tensor]) -> None:
        for teacher in self.teachers:
            teacher.apply_to_tensors(fn)
