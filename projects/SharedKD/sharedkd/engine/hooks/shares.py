"""Measures each distillation term's share of the student's gradient."""

import logging
import math
from collections import deque
from typing import Any, Deque, Dict, List, Optional, Set, Tuple

import torch
from detectron2.engine import hooks
from detectron2.utils import comm

from sharedkd.engine.trainer import SharedKDTrainer, Step
from sharedkd.errors import RunError
from sharedkd.modeling.snapshot import without_trace
from sharedkd.modeling.stages import DISTILL, own_losses
from sharedkd.values import check_number

__all__ = ["Watchdog", "gradient_norms"]

logger = logging.getLogger("detectron2.sharedkd")

DETECTOR = "detector"
DOMINANT = 0.9  # share of the gradient norm from which a term is reported
UNBALANCED = 0.5  # share of its stage's terms from which a term is reported once
WINDOW = 3  # measurements from which a report is made
LEAST = 4  # measurements in a run, however short
SHORTEST = 20  # iterations between them


class Watchdog(hooks.HookBase):
    """Measures each distillation term's share of the student's gradient, every ``period`` iterations.

    The share of a term is the norm of its gradient with respect to all of the student's parameters,
    over the sum of these norms; the detector's losses count together as one term.  So losses on maps of
    the backbone, maps of the FPN and logits can be compared.  Shares are logged as
    ``watch/<stage>/<term>`` and ``watch/detector``.  After every :data:`WINDOW` measurements:

    - A term is reported if its mean share is above :data:`DOMINANT`, or its share was always zero.
    - A term with more than :data:`UNBALANCED` of its stage's norms is reported once.  A term is one level
      of most losses.
    - The run ends if a stage has given the student no gradient since the run began.

    A measurement runs one more forward, of one image a process, and a backward for each term.  It
    leaves no trace in the training: no parameter, gradient, statistic or random draw changes.

    Args:
        period: iterations between two measurements.
        max_iter: length of the run; if it is too short for :data:`LEAST` measurements, the period is
            shorter, but at least :data:`SHORTEST`.

    Raises:
        RunError: in a step, no term of a stage has had a gradient since the run began.
    """

    def __init__(self, period: int, max_iter: float = math.inf):
        check_number("train.watch_period", period, least=1)
        self.period = min(period, max(SHORTEST, max_iter // LEAST))
        self._windows: Dict[str, Deque[Tuple[int, float]]] = {}  # (iteration, share)
        self._unbalanced: Set[str] = set()  # terms that were reported as such
        self._alive: Set[str] = set()  # stages that have had a gradient
        self._shown: Deque[bool] = deque(maxlen=WINDOW)  # whether images with objects were measured

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            self._measure()

    def _measure(self) -> None:
        trainer = self.trainer
        # Most distillation losses have a gradient where there are objects.
        record = max(trainer.step.batches[-1], key=lambda x: len(x.get("instances", ())))
        self._shown.append(all(comm.all_gather(len(record.get("instances", ())) > 0)))
        norms = _mean_over_ranks(gradient_norms(trainer, [record]))
        total = sum(x for x in norms.values() if x is not None)
        if not 0 < total < float("inf"):
            return  # not finite, or no term has a gradient on this image
        shares = {name: x / total for name, x in norms.items() if x is not None}
        trainer.storage.put_scalars(
            smoothing_hint=False, **{f"watch/{name}": share for name, share in shares.items()}
        )
        shares.pop(DETECTOR)
        # A term whose stage is off starts a new window when it is on again.
        self._windows = {k: self._windows.get(k, deque(maxlen=WINDOW)) for k in shares}
        for name, window in self._windows.items():
            window.append((trainer.iter, shares[name]))
        full = {k: sum(x for _, x in w) for k, w in self._windows.items() if len(w) == WINDOW}
        self._alive |= {name.split("/")[0] for name, share in shares.items() if share}
        begun = trainer.start_iter == 0 and all(self._shown)  # a resumed run's may be at its end
        for name in full if begun else ():
            if name.split("/")[0] not in self._alive:
                raise self._without_gradient(name)
        for name, share in full.items():
            stage = sum(full[k] for k in full if k.split("/")[0] == name.split("/")[0])
            if UNBALANCED * stage < share < stage and name not in self._unbalanced:
                self._report_unbalanced(name, share / stage)
            self._report(name, self._windows[name])

    def _without_gradient(self, name: str) -> RunError:
        stage, window = name.split("/")[0], self._windows[name]
        key, now = f"model.stages.{stage}", self.trainer.stages[stage]
        problem = (
            f"has given the student no gradient in iterations {window[0][0]} to {window[-1][0]}"
        )
        fix = "correct what this loss compares, or leave the stage out"
        return RunError(f"{key}.loss", type(now.loss).__name__, problem, fix)

    def _report_unbalanced(self, name: str, share: float) -> None:
        stage, term = name.split("/", 1)
        key, now = f"model.stages.{stage}", self.trainer.stages[stage]
        if now.balanced:
            return  # equal at the maps
        self._unbalanced.add(name)
        auto = "" if now.auto else f"{key}.weight=auto "
        logger.warning(
            f"Watchdog: term {term} has {100 * share:.0f} % of the gradient norms of stage {stage}; "
            f"{auto}{key}.balance=levels sets equal shares for all its terms"
        )

    def _report(self, name: str, window: Deque[Tuple[int, float]]) -> None:
        (stage, term), shares = name.split("/", 1), [share for _, share in window]
        mean = sum(shares) / len(shares)
        when = f"Watchdog, iterations {window[0][0]} to {window[-1][0]}: stage {stage}, term {term}"
        key = f"model.stages.{stage}"
        now = self.trainer.stages[stage]
        lower = f"share, now {now.share:g}" if now.auto else f"weight, now {now.full:g}"
        if mean > DOMINANT:
            logger.warning(
                f"{when} has {100 * mean:.0f} % of the student's gradient norm, the detector's "
                f"losses and all other terms have the rest; lower {key}.{lower}"
            )
        elif not any(shares):
            logger.warning(
                f"{when} has 0 % of the student's gradient norm: the student learns nothing from it; "
                f"check what this loss compares, or save its time with {key}.weight=0"
            )
        else:
            return
        window.clear()


def gradient_norms(
    trainer: SharedKDTrainer, records: List[Dict[str, Any]]
) -> Optional[Dict[str, Optional[float]]]:
    """Norm of the gradient with respect to the student's parameters, of each term of the total loss.

    Returns:
        ``detector`` (its losses together) and ``<stage>/<term>`` -> norm, each as it counts in the
        total; None for a term that by construction trains the parameters of its loss alone, as that
        of a discriminator does.  None instead of all: the detector found its own numbers not finite.
    """
    params = [p for p in trainer.detector.parameters() if p.requires_grad]
    students = set(params)
    owned = [p for p in trainer.module.parameters() if p.requires_grad and p not in students]
    scale = trainer.scaler.get_scale()  # so that float16 gradients do not vanish
    with without_trace(trainer.module):
        try:
            counted = trainer.repeat(Step(trainer.iter, trainer.stage_weights()), records)
        except FloatingPointError:
            return None
        parts = {DETECTOR: sum(own_losses(counted))}
        parts.update({k[len(DISTILL) :]: x for k, x in counted.items() if k.startswith(DISTILL)})
        norms: Dict[str, Optional[float]] = {}
        for name, loss in parts.items():
            found = _gradients(scale * loss, params)
            if found:
                norm = torch.stack([x.double().norm() for x in found]).norm()
                norms[name] = norm.item() / scale
            else:
                norms[name] = None if _gradients(loss, owned) else 0.0
    return norms


def _gradients(loss: torch.Tensor, params: List[torch.Tensor]) -> List[torch.Tensor]:
    """The gradients of the parameters that the loss depends on."""
    if not (loss.requires_grad and params):
        return []
    found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    return [x for x in found if x is not None]


def _mean_over_ranks(norms: Optional[Dict[str, Optional[float]]]) -> Dict[str, Optional[float]]:
    """The mean over ranks; empty if a rank could not measure."""
    ranks = comm.all_gather(norms)
    if None in ranks:
        return {}
    mean = {}
    for name, first in ranks[0].items():
        if all(name in each for each in ranks):
            total = sum(each[name] or 0.0 for each in ranks)
            mean[name] = None if first is None else total / len(ranks)
    return mean
