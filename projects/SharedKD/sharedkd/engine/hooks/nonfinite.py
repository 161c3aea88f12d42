"""Numbers that go bad: what happens to a step that is not finite, and where in it the numbers broke."""

import logging
import math
from collections import defaultdict
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, List, Mapping, Sequence, Tuple

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from sharedkd.config.defaults import NONFINITE_POLICIES
from sharedkd.engine.snapshot import without_trace
from sharedkd.errors import ConfigError, NonFiniteLossError
from sharedkd.modeling.taps import FeatureTap

if TYPE_CHECKING:  # it imports this module
    from sharedkd.engine.trainer import SharedKDTrainer, _Step

__all__ = ["BadSteps", "culprits", "find_culprits", "not_finite"]

logger = logging.getLogger("detectron2.sharedkd")


class BadSteps:
    """What to do about a step whose losses or gradient are not finite.

    Args:
        policy: ``stop`` ends the run; ``skip_step`` leaves the step out and goes on.
        limit: how many steps in a row may be left out; one more ends the run.

    Attributes:
        in_a_row: steps left out since the last good one.
        total: steps left out since the run began.

    Raises:
        ConfigError: no such policy, or a negative limit.
    """

    def __init__(self, policy: str = "stop", limit: int = 10):
        if policy not in NONFINITE_POLICIES:
            raise ConfigError(
                "train.on_nonfinite",
                policy,
                "no such policy",
                f"use {' or '.join(NONFINITE_POLICIES)}",
            )
        if limit < 0:
            raise ConfigError("train.max_skipped_steps", limit, "is negative", "use 0 or more")
        self.skipping, self.limit = policy == "skip_step", limit
        self.in_a_row = self.total = 0

    def bad(self, iteration: int, what: str) -> None:
        """A step is not finite.

        Args:
            iteration: of the step.
            what: is not finite, in words.

        Raises:
            NonFiniteLossError: the run is to end.
        """
        message = f"iteration {iteration}: {what}"
        ending = "training stops, the last checkpoint is intact"
        if not self.skipping:
            raise NonFiniteLossError(f"{message}; {ending}")
        if self.in_a_row >= self.limit:
            raise NonFiniteLossError(
                f"{message}; {self.in_a_row} steps in a row are skipped already, as many as "
                f"train.max_skipped_steps={self.limit} allows: {ending}"
            )
        self.in_a_row += 1
        self.total += 1
        logger.warning(f"{message}; the step is skipped ({self.in_a_row} in a row)")

    def good(self) -> None:
        """A step is finite."""
        self.in_a_row = 0

    def state_dict(self) -> Dict[str, int]:
        return dict(in_a_row=self.in_a_row, total=self.total)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Count on from ``state``, of :meth:`state_dict`."""
        self.in_a_row, self.total = state["in_a_row"], state["total"]


def not_finite(metrics: Mapping[str, float]) -> str:
    """What is wrong with a step's numbers, in words; empty: nothing, or an overflow of float16.

    Args:
        metrics: losses by name, sums of them (``total_loss``, ``loss_distill_*``), ``grad_norm``, and
            the ``loss_scale`` of a step in float16.
    """
    broken = {name: x for name, x in metrics.items() if not math.isfinite(x)}
    norm = broken.pop("grad_norm", None)
    if broken:
        sums = ("total_loss", "loss_distill_")
        terms = {k: x for k, x in broken.items() if not k.startswith(sums)}
        return f"{', '.join(f'{k}={x}' for k, x in (terms or broken).items())} is not finite"
    # At a scale of 1 there is nothing that could have overflowed but the gradient itself.
    if norm is not None and not metrics.get("loss_scale", 1.0) > 1.0:
        return f"the gradient's norm is {norm}, all losses are finite"
    return ""


def find_culprits(trainer: "SharedKDTrainer", step: "_Step", together: bool) -> List[str]:
    """:func:`culprits` of every rank; with several, each line begins with its rank.

    Args:
        trainer, step: see :func:`culprits`.
        together: all ranks call this for the same step; False: this rank looks at its own alone.

    Returns:
        as :func:`culprits`; nothing for a student with SyncBatchNorm on several ranks.
    """
    if comm.get_world_size() == 1:
        return culprits(trainer, step)
    if any("SyncBatchNorm" in type(m).__name__ for m in trainer.detector.modules()):
        return []  # its forward waits for the other ranks, which may have broken elsewhere
    found = culprits(trainer, step)
    if not together:
        return [f"rank {comm.get_rank()}: {x}" for x in found]
    return [f"rank {rank}: {x}" for rank, each in enumerate(comm.all_gather(found)) for x in each]


def culprits(trainer: "SharedKDTrainer", step: "_Step") -> List[str]:
    """Where a step broke, found by running it once more with every map looked at.

    Its random draws depend on seed and iteration, so that it breaks in the same place again.  On a
    GPU, where losses are read later, the weights may have moved a few steps on; a bad step is kept
    from them.

    Args:
        trainer: of the step.
        step: what it remembers of the step: ``iteration``, stages' ``weights``, ``batches``.

    Returns:
        in words, the first things that were not finite: weights; else images and ground truth, else
        the first maps of each detector, by tap and stride; else gradients.
    """
    bad = _bad_names(trainer.module.named_parameters())
    if bad:
        return [f"weights: {_range(bad)}"]
    bad = [x for batch in step.batches for record in batch for x in _bad_parts(record)]
    if bad:
        return bad
    maps: Dict[Tuple[str, str], Dict[int, None]] = defaultdict(dict)
    with without_trace(trainer.module, trainer.detector):
        for part, batch in enumerate(step.batches):
            with _looked_at(trainer, maps):
                try:
                    total, _ = trainer.repeat(batch, part, step.iteration, step.weights)
                except FloatingPointError:
                    continue
            if not maps and torch.isfinite(total):
                params = {k: p for k, p in trainer.module.named_parameters() if p.requires_grad}
                bad += _bad_names(
                    zip(
                        params, torch.autograd.grad(total, list(params.values()), allow_unused=True)
                    )
                )
    first: Dict[str, str] = {}  # what a detector computes after its first bad map, is bad as well
    for (who, tap), strides in maps.items():
        first.setdefault(who, f"{who}'s {tap} map of stride {', '.join(map(str, strides))}")
    if first or not bad:
        return list(first.values())
    return [f"gradient of {_range(list(dict.fromkeys(bad)))}"]


def _bad_names(tensors: Iterable[Tuple[str, Tensor]]) -> List[str]:
    return [name for name, x in tensors if x is not None and not torch.isfinite(x).all()]


def _range(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} parameters)"


def _bad_parts(record: Mapping[str, Any]) -> Iterator[str]:
    """What a data loader's record holds that is not finite."""
    name = record.get("file_name", "without a file name")
    if not torch.isfinite(record["image"]).all():
        yield f"image {name}"
    truth = record.get("instances")
    if hasattr(truth, "gt_boxes") and not torch.isfinite(truth.gt_boxes.tensor).all():
        yield f"ground-truth boxes of image {name}"


def _looked_at(
    trainer: "SharedKDTrainer", maps: Dict[Tuple[str, str], Dict[int, None]]
) -> ExitStack:
    """Within it, maps that are not finite are noted: (detector, tap) -> strides."""
    stack = ExitStack()
    detectors: Dict[str, nn.Module] = {"student": trainer.detector}
    teacher = getattr(trainer.module, "teacher", None)
    if teacher is not None:
        detectors["teacher"] = teacher.model
    for who, detector in detectors.items():

        def look(tap: str, levels: Dict[int, Tensor], who: str = who) -> None:
            for stride, x in levels.items():
                if not torch.isfinite(x).all():
                    maps[who, tap][stride] = None

        if hasattr(getattr(detector, "backbone", None), "output_shape"):
            stack.enter_context(FeatureTap(detector).each(look))
    return stack
