"""Reads, checks and logs the losses of each step."""

import logging
import math
from typing import Any, Dict, List, Mapping

import torch
from detectron2.engine import hooks
from detectron2.utils import comm

from sharedkd.config.defaults import NONFINITE_POLICIES
from sharedkd.engine.hooks.nonfinite import find_culprits
from sharedkd.errors import ConfigError, NonFiniteLossError
from sharedkd.modeling.snapshot import Snapshot
from sharedkd.modeling.stages import DISTILL, owner_of, under
from sharedkd.values import check_number

__all__ = ["StepLog"]

logger = logging.getLogger("detectron2.sharedkd")


class StepLog(hooks.HookBase):
    """Logs the losses of each step, and refuses a step whose losses or gradient are not finite.

    Numbers of several steps are copied to the CPU at once, so that a step on a GPU does not wait for
    the one before.  Until they are read, a gradient that is not finite is set to zero.

    Args:
        period: steps between two reads; losses are also read in the last step and before a checkpoint.
        policy: ``stop`` ends the run; ``skip_step`` skips the step, and reads every step.
        limit: how many steps in a row may be skipped; one more ends the run.

    Attributes:
        in_a_row: steps skipped since the last good one.
        total: steps skipped since the run began.
    """

    trainer: Any  # a SharedKDTrainer, which imports this module

    def __init__(self, period: int = 1, policy: str = "stop", limit: int = 10):
        if policy not in NONFINITE_POLICIES:
            fix = f"use {' or '.join(NONFINITE_POLICIES)}"
            raise ConfigError("train.on_nonfinite", policy, "no such policy", fix)
        check_number("train.max_skipped_steps", limit, least=0, whole=True)
        self.skipping, self.limit = policy == "skip_step", limit
        self.period = 1 if self.skipping else period
        self.in_a_row = self.total = 0
        self._unread: List[Any] = []

    def before_step(self) -> None:
        if self.skipping:
            self._before = Snapshot(self.trainer.module)

    def after_backward(self) -> None:
        """Record the step, and read the recorded steps if it is time.

        Raises:
            NonFiniteLossError: a loss or the gradient is infinite or NaN on any rank, and the step
                may not be skipped.  The weights have not changed.
        """
        step, now = self.trainer.step, self.trainer.iter + 1
        self._unread.append(step)
        if now % self.period == 0 or now == self.trainer.schedule_length or step.failure:
            self._read(together=True)
            if step.refused:
                self._before.restore()
        else:
            _zero_if_not_finite(step, self.trainer.optimizer)

    def _read(self, together: bool) -> None:
        """Check and log the steps that were not read yet, and refuse a bad one.

        ``together``: all ranks call this.
        """
        steps, self._unread = self._unread, []
        scalars = [x.double() for step in steps for x in step.metrics.values()]
        values = iter(torch.stack(scalars).tolist() if scalars else ())
        for step in steps:
            metrics = {name: next(values) for name in step.metrics}
            what = step.failure or _not_finite(metrics)
            if what:
                # The other ranks may not be reading: a rank whose detector failed ends alone.
                alone = step.failure and self.period > 1
                found = find_culprits(self.trainer, step, together and not alone)
                self._refuse(step, what + (f" ({'; '.join(found)})" if found else ""))
                metrics = {}
            elif math.isfinite(metrics["grad_norm"]):
                self.in_a_row = 0
            else:
                del metrics["grad_norm"]  # an overflow: the scaler skips the step
            if comm.is_main_process():
                self._log(step, metrics)

    def _refuse(self, step: Any, what: str) -> None:
        message = f"iteration {step.iteration}: {what}"
        clip = self.trainer.clip_grad_norm
        ending = (
            "training stops before the weights change; lower optimizer.lr="
            f"{self.trainer.optimizer.param_groups[0]['lr']:g} (now), or clip the gradient by a "
            f"{'smaller ' if clip else ''}train.clip_grad_norm={clip or 10:g}"
        )
        if not self.skipping:
            raise NonFiniteLossError(f"{message}; {ending}")
        if self.in_a_row >= self.limit:
            raise NonFiniteLossError(
                f"{message}; {self.in_a_row} steps in a row are skipped already, as many as "
                f"train.max_skipped_steps={self.limit} allows: {ending}"
            )
        step.refused = True
        self.in_a_row += 1
        self.total += 1
        logger.warning(f"{message}; the step is skipped ({self.in_a_row} in a row)")

    def _log(self, step: Any, metrics: Dict[str, float]) -> None:
        """Log each stage's raw values and weight, and the weighted losses that train the student."""
        storage, now = self.trainer.storage, self.trainer.iter
        storage.iter = step.iteration
        for name, weight in step.weights.items():
            prefix = f"{under(DISTILL, name)}/"
            for key in [k for k in metrics if k.startswith(prefix)]:
                metrics[key] /= weight * self._factor(metrics, name, key[len(prefix) :])
            storage.put_scalar(f"{prefix}weight", weight, smoothing_hint=False)
        storage.put_scalars(data_time=step.data_time, **metrics)
        if self.skipping:
            storage.put_scalar("skipped_steps", self.total, smoothing_hint=False)
        storage.iter = now

    def _factor(self, metrics: Mapping[str, float], stage: str, term: str) -> float:
        """The factor of a term whose stage's weight sets itself, if it has one."""
        auto, group = self.trainer.auto_weights.get(stage), under("factor/", stage)
        if auto is None or term in auto.apart:
            return 1.0
        return metrics.get(f"{group}/{term}" if auto.by_term else group, 0.0) or 1.0

    def state_dict(self) -> Dict[str, int]:
        """The numbers of skipped steps.

        Raises:
            NonFiniteLossError: a step that was not read yet is not finite; so a broken run saves no
                checkpoint.
        """
        self._read(together=False)
        return dict(in_a_row=self.in_a_row, total=self.total)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.in_a_row, self.total = state["in_a_row"], state["total"]


def _not_finite(metrics: Mapping[str, float]) -> str:
    """Describe what is not finite in a step; empty: nothing, or a float16 overflow."""
    broken = {name: x for name, x in metrics.items() if not math.isfinite(x)}
    norm = broken.pop("grad_norm", None)
    if broken:
        sums = ("total_loss", "loss_distill_")
        terms = {k: x for k, x in broken.items() if not k[len(owner_of(k)) :].startswith(sums)}
        return f"{', '.join(f'{k}={x}' for k, x in (terms or broken).items())} is not finite"
    # At a scale of 1 only the gradient itself can have overflowed.
    if norm is not None and not metrics.get("loss_scale", 1.0) > 1.0:
        return f"the gradient's norm is {norm}, all losses are finite"
    return ""


def _zero_if_not_finite(step: Any, optimizer: torch.optim.Optimizer) -> None:
    """Zero a gradient that is not finite; the device decides, without a copy to the CPU."""
    totals = [x for k, x in step.metrics.items() if k == f"{owner_of(k)}total_loss"]
    bad = ~torch.isfinite(step.metrics["grad_norm"] + sum(totals))
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.masked_fill_(bad, 0.0)
