"""The start of a student's FPN: laterals that give what its teacher's give, by least squares."""

import re
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sharedkd.weights.loading import at_scale

from .meta_arch import SharedKD
from .preparation import size_divisibility
from .snapshot import Snapshot
from .taps import run_pyramid
from .teachers import FrozenTeacher

__all__ = ["fit_laterals"]

_LATERAL = re.compile(r"backbone\.fpn_lateral\d+")
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
    squares of x, the mean over its channels.  A level above the teacher's (see ``scale``) is fitted to the
    teacher's coarsest lateral, and the level below it to what it leaves of that: the FPN adds the two.  Ours; the linear case of FitNets' hint training (ICLR 2015), in closed form.

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
    twins = {name: at_scale(name, teacher.scale) for name in ours}
    fitted = [x for x in ours if twins[x] in theirs and _widths(ours[x], theirs[twins[x]])]
    if not fitted:
        return {}
    # From the coarsest on: those without a twin, then the coarsest that has one, whose target they share.
    above = sorted(ours.keys() - {*fitted}, key=_level, reverse=True)
    base = max(fitted, key=_level)
    inputs = {name: [*above, name] if name == base else [name] for name in fitted}
    moments = {name: _Moments() for name in fitted}
    with _as_in_training(student), _seen(ours) as read, _seen(theirs) as given:
        for batch in _batches(records):
            run_pyramid(student, batch, key="model.student")
            divisor = size_divisibility(student)
            teacher.features(batch, frozenset({"fpn"}), pair.input_format, divisor)
            if not given:  # its pyramid ends before the FPN
                return {}
            for name, sums in moments.items():
                size = read[name][0].shape[-2:]
                x = [F.interpolate(read[each][0], size) for each in inputs[name]]
                sums.add(torch.cat(x, 1), given[twins[name]][1])
    if not all(x.count for x in moments.values()):
        return {}
    explained = {}
    for name, sums in moments.items():
        convolutions = [ours[x] for x in inputs[name]]
        solutions, explained[name] = sums.solve([x.in_channels for x in convolutions])
        for conv, solution in zip(convolutions, solutions):
            conv.weight.copy_(solution[:-1].T[:, :, None, None])
            conv.bias.copy_(solution[-1])
    return explained


def _widths(conv: nn.Conv2d, other: nn.Conv2d) -> bool:
    return conv.out_channels == other.out_channels


def _level(name: str) -> int:
    return int(name.removeprefix("backbone.fpn_lateral"))


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

    def solve(self, widths: Sequence[int]) -> Tuple[List[Tensor], float]:
        """Fit the channels of x in groups of ``widths``, each to what those before it have left of y.

        Returns:
            weights and bias of each group, (width + 1, C); and 1 - the mean square of what is left over the
            variance of y.
        """
        whole, found, begin = torch.zeros_like(self.xy), [], 0
        for width in widths:
            rows = torch.tensor([*range(begin, begin + width), len(whole) - 1])
            square = self.xx[rows][:, rows]
            ridge = (RIDGE * square.diag()[:-1].mean()).clamp(min=_LEAST).repeat(len(rows))
            ridge[-1] = 0
            left = self.xy[rows] - self.xx[rows] @ whole
            found.append(torch.linalg.solve(square + ridge.diag(), left))
            whole[rows] += found[-1]
            begin += width
        residual = self.yy - 2 * (whole * self.xy).sum(0) + (whole * (self.xx @ whole)).sum(0)
        variance = (self.yy - self.y.square() / self.count).sum().clamp(min=_LEAST)
        return found, 1 - (residual.sum() / variance).item()
