"""Time and memory that a run will need, measured in its first steps."""

import logging
import time

import torch
from detectron2.engine import hooks

from sharedkd.modeling.balance import WINDOW

from .record import hardware, peak_memory_mb

__all__ = ["STEPS", "Cost", "in_words"]

STEPS = 2  # the first warms up

logger = logging.getLogger("detectron2.sharedkd")


def in_words(seconds: float, steps: int, memory_mb: float, device: str) -> str:
    """One line about ``steps`` of training that take ``seconds`` each."""
    return (
        f"measured: {seconds:.3g} s a step on {device}, about {_duration(seconds * steps)} without "
        f"evaluations; {memory_mb:.0f} MB at the peak"
    )


def _duration(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.2g} {name}"
    return f"{seconds:.2g} s"


class Cost(hooks.HookBase):
    """Logs time and memory of the second step, and the time that the remaining steps will take."""

    def before_step(self) -> None:
        self.start = time.perf_counter()

    def after_step(self) -> None:
        trainer = self.trainer
        if trainer.iter != trainer.start_iter + STEPS - 1:
            return
        device = next(trainer.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds, steps = time.perf_counter() - self.start, trainer.max_iter - trainer.start_iter
        said = in_words(seconds, steps, peak_memory_mb(), hardware(device))
        if trainer.auto_weights:
            said += f"; faster after {WINDOW} steps, which measure the weights that set themselves"
        logger.info(said)
