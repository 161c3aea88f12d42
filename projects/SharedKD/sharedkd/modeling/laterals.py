"""The start of a student's FPN: laterals that give what its teacher's give, by least squares."""

import re
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any, Dict, Iterable, Iterator, List, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sharedkd.weights.loading import at_scale

from .meta_arch import SharedKD
from .preparation import size_divisibility
from .snapshot import Snapshot
from .taps import run_pyramid
from .teachers import FrozenTeacher

__all__ = ["fit_laterals"]

_LATERAL = re.compile(r"backbone\.fpn_lateral(\d+)")  # the binary logarithm of its stride
BATCH = 4  #: images that a batch norm sees at once
RIDGE = 1e-3  #: of the inputs' sum of squares
_LEAST = 1e-12  # for maps of zeros


@torch.no_grad()
def fit_laterals(pair: SharedKD, records: Iterable[Dict[str, Any]]) -> Dict[str, float]:
    """Set the laterals of the student's FPN to the linear functions that come nearest to its teacher's.

    A lateral reads the channels of its own bottom-up network, so that a copy of the teacher's means
    nothing.  With fitted ones the FPN gives about what the teacher's gives, and heads that are copies of
    the teacher's detect objects before the first iteration.

    A level's W and b minimise ``sum |W x + b - y|^2 + RIDGE * s * |W|^2`` over all positions of all images;
    x: the student's bottom-up map, (C_in); y: what the teacher's lateral gives, (C); s: the sum of the
    squares of x, the mean over its channels.  A level that the teacher lacks (see ``scale``) adds nothing
    to those below it until it has learnt something.  Ours; the linear
    case of FitNets' hint training (ICLR 2015), in closed form.

    Args:
        pair: its teacher is a FrozenTeacher.
        records: Detectron2's, as the loader delivers them; what is left after batches of four is not used.

    Returns:
        lateral -> the share of the variance of the teacher's outputs that it explains.  Empty, and
        nothing is done, without Detectron2's FPN on both sides, of equal width and without norms.
    """
    student, teacher = pair.student, pair.teacher
    assert isinstance(teacher, FrozenTeacher)
    ours, theirs = _laterals(student), _laterals(teacher.model)
    names = {name: at_scale(name, teacher.scale) for name in ours}
    moments = {
        name: _Moments()
        for name, other in names.items()
        if other in theirs and theirs[other].out_channels == ours[name].out_channels
    }
    if not moments:
        return {}
    with _as_in_training(student), _seen(ours) as read, _seen(theirs) as given:
        for batch in _batches(records):
            run_pyramid(student, batch, key="model.student")
            divisor = size_divisibility(student)
            teacher.features(batch, frozenset({"fpn"}), pair.input_format, divisor)
            if not given:  # its pyramid ends before the FPN
                return {}
            for name, sums in moments.items():
                sums.add(read[name][0], given[names[name]][1])
    if not all(x.count for x in moments.values()):
        return {}
    explained = {}
    for name, conv in ours.items():
        if name in moments:
            solution = moments[name].solution()
            conv.weight.copy_(solution[:-1].T[:, :, None, None])
            conv.bias.copy_(solution[-1])
            explained[name] = moments[name].explained(solution)
        else:
            conv.weight.zero_()
            conv.bias.zero_()
    return explained


def _batches(records: Iterable[Dict[str, Any]]) -> Iterator[List[Dict[str, Any]]]:
    """Batches of ``BATCH`` records, or all of them if they are fewer."""
    rest, first = iter(records), True
    while batch := list(islice(rest, BATCH)):
        if first or len(batch) == BATCH:
            yield batch
        first = False


def _laterals(detector: nn.Module) -> Dict[str, nn.Conv2d]:
    """The laterals of a detector's FPN by name, if they are convolutions and nothing else."""
    found = {name: x for name, x in detector.named_modules() if _LATERAL.fullmatch(name)}
    plain = all(x.bias is not None and getattr(x, "norm", None) is None for x in found.values())
    return found if plain else {}


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """A context in which batch norms normalise by the batch, and nothing is random or changes."""
    training, before = model.training, Snapshot(model)
    model.eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(training)
    try:
        yield
    finally:
        model.train(training)
        before.restore()


@contextmanager
def _seen(modules: Dict[str, nn.Module]) -> Iterator[Dict[str, Tuple[Tensor, Tensor]]]:
    """A context that keeps the last input and output of each module, by its name."""
    found: Dict[str, Tuple[Tensor, Tensor]] = {}

    def see(name: str, module: nn.Module, args: Tuple[Tensor, ...], output: Tensor) -> None:
        found[name] = args[0], output

    with ExitStack() as hooks:
        for name, x in modules.items():
            hooks.enter_context(x.register_forward_hook(partial(see, name)))
        yield found


class _Moments:
    """The sums over all positions that a least squares needs, in float64."""

    def __init__(self) -> None:
        self.xx = self.xy = self.yy = self.y = torch.zeros((), dtype=torch.float64)
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the positions that both maps have, (N, C_in, H, W) and (N, C, H, W), if all are finite."""
        height, width = (min(sides) for sides in zip(x.shape[-2:], y.shape[-2:]))
        x, y = (z[..., :height, :width].transpose(0, 1).flatten(1).double() for z in (x, y))
        if not (x.isfinite().all() and y.isfinite().all()):  # beyond float16
            return
        x = torch.cat([x, torch.ones_like(x[:1])])
        self.xx, self.xy = self.xx.to(x) + x @ x.T, self.xy.to(x) + x @ y.T
        self.yy, self.y = self.yy.to(y) + y.square().sum(1), self.y.to(y) + y.sum(1)
        self.count += y.shape[1]

    def solution(self) -> Tensor:
        """Weights and bias, (C_in + 1, C)."""
        ridge = (RIDGE * self.xx.diag()[:-1].mean()).clamp(min=_LEAST).repeat(len(self.xx))
        ridge[-1] = 0
        return torch.linalg.solve(self.xx + ridge.diag(), self.xy)

    def explained(self, w: Tensor) -> float:
        """1 - the mean square of the residual of the solution ``w`` over the variance of y."""
        residual = self.yy - 2 * (w * self.xy).sum(0) + (w * (self.xx @ w)).sum(0)
        variance = (self.yy - self.y.square() / self.count).sum().clamp(min=_LEAST)
        return 1 - (residual.sum() / variance).item()
