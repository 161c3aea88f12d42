"""Stages: a distillation loss with its weight and schedule."""

from dataclasses import dataclass
from typing import Dict, Iterable, List, Mapping, Optional, Tuple, Union

from torch import Tensor

from sharedkd.errors import ConfigError, Findings
from sharedkd.losses.base import DistillationLoss
from sharedkd.values import check_choice, check_number, check_switch, check_text

from .balance import WINDOW

__all__ = [
    "DISTILL",
    "PEER",
    "TIMES",
    "Stage",
    "iterations",
    "own_losses",
    "owner_of",
    "stage_dict",
    "terms_of",
    "under",
]

DISTILL = "distill/"  #: what the names of distillation losses begin with
PEER = "peer/"  #: what the names of a peer's losses and stages begin with: ``peer/<its name>/``
TIMES = ("start", "ramp", "decay", "end")  #: a stage's schedule


@dataclass
class Stage:
    """One distillation loss with its schedule.

    ``start``, ``ramp``, ``decay`` and ``end`` are iterations when they are ints and fractions of
    ``train.max_iter`` when they are floats (``end=0.7``: the last 30 % train without this loss).

    Args:
        loss: the loss.
        weight: its weight when fully on; the published weight study of Shared-KD prefers 2.  ``auto``:
            it sets itself by ``share``, see :class:`~sharedkd.modeling.balance.AutoWeight`.
        start: the first iteration that uses it.
        ramp: over how many iterations the weight grows linearly from ``weight / ramp`` to ``weight``.
        end: the first iteration that no longer uses it; None: never ends.  ``teacher``: where the
            student is level with its teacher, see :class:`~sharedkd.engine.hooks.outgrown.Outgrown`.
        teacher: the name of the source of maps that it learns from, one of the model's ``teachers``;
            None: the model's ``teacher``.
        share: with ``auto``, the norm of its gradient at the student's maps over that of the detector's
            own losses.
        every: with ``auto``, steps from one measurement to the next, at least the 50 that one takes; 0: only
            at the start.
        balance: with ``auto``, ``levels`` sets an equal share for each term, which is one level of most
            losses; None: the terms keep their ratios.
        published: the strides of the loss are those of its publication, and what the pair does not have of
            them is left out, with a warning.  False: it is refused.
        decay: over how many iterations before its end the weight falls linearly, to ``weight / decay`` in
            the last one.
    """

    loss: DistillationLoss
    weight: Union[float, str] = 1.0
    start: Union[int, float] = 0
    ramp: Union[int, float] = 0
    end: Optional[Union[int, float, str]] = None
    teacher: Optional[str] = None
    share: float = 0.3
    every: int = 0
    balance: Optional[str] = None
    published: bool = False
    decay: Union[int, float] = 0

    def __post_init__(self) -> None:
        if isinstance(self.loss, DistillationLoss):
            self.loss.published = self.published

    @property
    def auto(self) -> bool:
        """Whether the weight sets itself."""
        return self.weight == "auto"

    @property
    def balanced(self) -> bool:
        """Whether each of its terms has a weight that sets itself."""
        return self.auto and self.balance is not None

    @property
    def full(self) -> float:
        """The weight when fully on; 1 if it sets itself."""
        return 1.0 if isinstance(self.weight, str) else self.weight

    def __str__(self) -> str:
        return f"weight auto, share {self.share:g}" if self.auto else f"weight {self.weight:g}"

    def check(self, key: str) -> None:
        """Check the arguments; ``key`` is this stage's place in the config, for messages.

        Raises:
            ConfigError: the loss is no distillation loss, a weight or time is negative or infinite, or the
                end is not after the start.
        """
        findings = Findings()
        if not isinstance(self.loss, DistillationLoss):
            findings.add(
                ConfigError(
                    f"{key}.loss",
                    self.loss,
                    "is no distillation loss",
                    "use L(LOSS)(...) with a class of sharedkd.losses or a subclass of DistillationLoss",
                )
            )
        if isinstance(self.weight, str) and not self.auto:
            fix = "use a number, or auto"
            findings.add(ConfigError(f"{key}.weight", self.weight, "is no number", fix))
        if isinstance(self.end, str) and self.end != "teacher":
            fix = "use a time, teacher or null"
            findings.add(ConfigError(f"{key}.end", self.end, "is no time", fix))
        for name in ("weight", *TIMES):
            value = getattr(self, name)
            if name in ("weight", "end") and isinstance(value, str):
                continue  # checked above
            findings.step(check_number, f"{key}.{name}", value, least=0, or_null=name == "end")
        findings.step(check_switch, f"{key}.published", self.published)
        findings.step(check_number, f"{key}.share", self.share, above=0)
        findings.step(check_number, f"{key}.every", self.every, least=0, whole=True)
        if self.auto and isinstance(self.every, int) and 0 < self.every < WINDOW:
            problem = "is less than the steps that a measurement takes"
            fix = f"use 0, or {WINDOW} or more"
            findings.add(ConfigError(f"{key}.every", self.every, problem, fix))
        if self.balance is not None:
            findings.step(check_choice, f"{key}.balance", self.balance, ("levels",))
        if self.teacher is not None:
            findings.step(check_text, f"{key}.teacher", self.teacher, empty=False)
        findings.raise_errors()
        if self.end is not None and type(self.end) is type(self.start) and self.end <= self.start:
            raise ConfigError(
                f"{key}.end",
                self.end,
                f"is not after start={self.start}",
                "use end=null or a later end",
            )

    def span(self, max_iter: int) -> Tuple[int, int]:
        """The first iteration of ``max_iter`` that uses the stage, and the first that no longer does.

        They are equal if no iteration uses it.
        """
        start, end = (iterations(x, max_iter) for x in (self.start, self.end))
        end = max_iter if end is None else min(end, max_iter)
        return (start, end) if self.full > 0 and start < end else (0, 0)

    def weight_at(self, iteration: int, max_iter: int) -> float:
        """The weight at ``iteration`` of ``max_iter``, counted from 0; zero when the stage is off.

        >>> from sharedkd.losses import CrossLayer
        >>> stage = Stage(CrossLayer(), weight=2.0, start=2, ramp=4, end=0.8)
        >>> [stage.weight_at(i, max_iter=10) for i in range(10)]
        [0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 0.0, 0.0]
        >>> stage = Stage(CrossLayer(), weight=2.0, decay=0.4)
        >>> [stage.weight_at(i, max_iter=10) for i in range(10)]
        [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5]
        """
        times = (self.start, self.ramp, self.decay, self.end)
        start, ramp, decay, end = (iterations(x, max_iter) for x in times)
        if iteration < start or (end is not None and iteration >= end):
            return 0.0
        grown = (iteration - start + 1) / max(ramp, 1)
        left = ((max_iter if end is None else end) - iteration) / max(decay, 1) if decay else 1.0
        return self.full * max(0.0, min(1.0, grown, left))


def iterations(time: Optional[Union[int, float, str]], max_iter: int) -> Optional[int]:
    """A stage's time in iterations of ``max_iter``; None: of no time, or until the teacher is outgrown."""
    if isinstance(time, str):
        return None
    return round(time * max_iter) if isinstance(time, float) else time


def owner_of(name: str) -> str:
    """What the names of all losses of one student begin with: ``peer/<its name>/``; of the first, nothing.

    Args:
        name: of one of its losses or stages.
    """
    return "/".join([*name.split("/", 2)[:2], ""]) if name.startswith(PEER) else ""


def under(group: str, stage: str) -> str:
    """The name of a stage in a group of logged values.

    >>> under("distill/", "pkd"), under("distill/", "peer/other/pkd")
    ('distill/pkd', 'peer/other/distill/pkd')
    """
    owner = owner_of(stage)
    return f"{owner}{group}{stage[len(owner) :]}"


def terms_of(losses: Iterable[str], stage: str) -> List[str]:
    """The names of a stage's terms among a step's losses."""
    return [name for name in losses if name.startswith(f"{under(DISTILL, stage)}/")]


def own_losses(losses: Mapping[str, Tensor], owner: str = "") -> List[Tensor]:
    """The losses of a detector itself among a step's losses.

    Args:
        owner: see :func:`owner_of`.
    """
    distilled = f"{owner}{DISTILL}"
    return [x for k, x in losses.items() if owner_of(k) == owner and not k.startswith(distilled)]


def stage_dict(**stages: Stage) -> Dict[str, Stage]:
    """Return ``stages`` by name: a LazyConfig node needs a function to call."""
    return stages
