"""When a distillation loss is on, and how much it weighs."""

from dataclasses import dataclass
from typing import Dict, Optional, Union

from .errors import ConfigError
from .losses.base import DistillationLoss

__all__ = ["Stage", "stage_dict"]


@dataclass
class Stage:
    """One distillation loss with its schedule.

    ``start``, ``ramp`` and ``end`` are iterations when they are ints and fractions of
    ``train.max_iter`` when they are floats (``end=0.7``: the last 30 % train without this loss).

    Args:
        loss: the loss.
        weight: its weight when fully on; the published weight study of Shared-KD prefers 2.
        start: the first iteration that uses it.
        ramp: over how many iterations the weight grows linearly from ``weight / ramp`` to ``weight``.
        end: the first iteration that no longer uses it; None: never ends.
        relative: the weight is a share of the detector's own loss: the loss is scaled so that
            weight 0.5 adds half of what the detector's losses sum to in the same step, whatever the
            raw value.  False: the weight multiplies the raw value, as published.
    """

    loss: DistillationLoss
    weight: float = 1.0
    start: Union[int, float] = 0
    ramp: Union[int, float] = 0
    end: Optional[Union[int, float]] = None
    relative: bool = False

    def check(self, key: str) -> None:
        """Raises:
        ConfigError: a negative weight or time, or an end that is not after the start.
        """
        for name in ("weight", "start", "ramp", "end"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(
                    f"{key}.{name}", value, "is negative or not a number", "use 0 or more"
                )
        if self.end is not None and type(self.end) is type(self.start) and self.end <= self.start:
            raise ConfigError(
                f"{key}.end",
                self.end,
                f"is not after start={self.start}",
                "use end=null or a later end",
            )

    def weight_at(self, iteration: int, max_iter: int) -> float:
        """The weight at an iteration counted from 0; zero when the stage is off."""
        start, ramp, end = (
            round(x * max_iter) if isinstance(x, float) else x
            for x in (self.start, self.ramp, self.end)
        )
        if iteration < start or (end is not None and iteration >= end):
            return 0.0
        return self.weight * min(1.0, (iteration - start + 1) / max(ramp, 1))


def stage_dict(**stages: Stage) -> Dict[str, Stage]:
    """The stages of a model by name: a LazyConfig node needs something to call."""
    return stages
