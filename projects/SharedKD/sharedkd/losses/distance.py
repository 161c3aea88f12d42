"""How far apart two aligned maps are: four distances, each raw or scale-free."""

from dataclasses import dataclass
from functools import reduce
from itertools import repeat
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from sharedkd.values import check_choice

from .base import precise, precision

__all__ = ["Distance", "DISTANCES", "NORMALIZATIONS", "masked_mean"]

EPS = 1e-6  # added to a variance: a constant map has a gradient of zero, not NaN
# How many numbers of a map are read at a time: as many as stay in the cache with what is computed of
# them.  On a GPU, enough for all of it.
CPU_BLOCK, GPU_BLOCK = 2**17, 2**24


def masked_mean(
    x: Tensor, mask: Optional[Tensor], dims: Sequence[int] = (0, 1, 2, 3), keepdim: bool = False
) -> Tensor:
    """Mean of ``x`` (N, C, H, W) over ``dims``, counting only where ``mask`` (N, 1, H, W) is one.

    Without a mask everything counts.
    """
    if mask is None:
        return x.mean(dims, keepdim)
    count = mask.sum(dims, keepdim) * (x.shape[1] if 1 in dims else 1)
    return (x * mask).sum(dims, keepdim) / count.clamp(min=1)


def _standardise(x: Tensor, mask: Optional[Tensor], dims: Sequence[int]) -> Tensor:
    centred = x - masked_mean(x, mask, dims, keepdim=True)
    return centred / (masked_mean(centred.square(), mask, dims, keepdim=True) + EPS).sqrt()


# Over which dimensions of (N, C, H, W) a map gets zero mean and unit variance.
STATISTICS: Dict[str, Tuple[int, ...]] = {
    # per channel over the batch (as PKD does, NeurIPS 2022): MSE becomes 2 (1 - Pearson correlation)
    "channel": (0, 2, 3),
    # the same per image, so that an image's loss does not depend on its batch
    "instance": (2, 3),
}

NORMALIZATIONS: Dict[str, Callable[[Tensor, Optional[Tensor]], Tensor]] = {
    # as published: the numbers as they are
    "none": lambda x, mask: x,
    "channel": lambda x, mask: _standardise(x, mask, STATISTICS["channel"]),
    "instance": lambda x, mask: _standardise(x, mask, STATISTICS["instance"]),
    # zero mean, unit variance over the channels of each position
    "position": lambda x, mask: _standardise(x, None, (1,)),
}

DISTANCES: Dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda x, y: (x - y).square(),
    "l1": lambda x, y: (x - y).abs(),
    "smooth_l1": lambda x, y: F.smooth_l1_loss(x, y, reduction="none"),
    "cosine": lambda x, y: 1 - F.cosine_similarity(x, y, dim=1, eps=EPS).unsqueeze(1),
}


class _StandardisedMSE(torch.autograd.Function):
    """The mean squared error of two standardised maps (N, C, H, W), which are never written.

    With cx = x - mean(x), vx = mean(cx^2), ix = 1 / sqrt(vx + EPS), the same of y, and
    r = mean(cx cy) ix iy, each mean per channel over ``dims``::

        mean((cx ix - cy iy)^2) = vx ix^2 + vy iy^2 - 2 r
        dL/dx = 2 / (positions * channels) * ((EPS ix^2 + r) ix^2 cx - ix iy cy)

    as 1 - vx ix^2 = EPS ix^2.  Both maps are read twice here and once for a gradient, which is all that
    is written of full size; maps of 16 bits stay what they are, and become float32 in passing.
    Autograd's own way through the same formula writes and reads some thirty maps of full size.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, y: Tensor, mask: Optional[Tensor], dims: Sequence[int]
    ) -> Tensor:
        ctx.size = x.shape[2:]
        x, y, mask = (None if each is None else each.flatten(2) for each in (x, y, mask))
        if mask is None:
            total = x.numel() // x.shape[1]
            count = total if 0 in dims else total // len(x)
        else:
            count = mask.sum(dims, keepdim=True).clamp(min=1)
            total = mask.sum().clamp(min=1)
        moments = [_moments(a, b, mask, dims, count) for a, b in _channels(x, y)]
        means, variances, (covariance,) = torch.cat(moments, 2).split([2, 2, 1])
        inverse = (variances + EPS).rsqrt()
        both = inverse[0] * inverse[1]
        r = covariance * both
        ctx.save_for_backward(x, y, mask, means, inverse, both, r)
        ctx.scale = 2 / (total * x.shape[1])
        # Of equal maps the difference is zero but for rounding.
        each = (variances * inverse * inverse).sum(0).sub_(r, alpha=2).clamp_(min=0)
        return (each * count).sum() * (ctx.scale / 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, y, mask, means, inverse, both, r = ctx.saved_tensors
        scale = gradient * ctx.scale
        other = both * -scale
        found: List[Optional[Tensor]] = [None, None]
        for i, (a, b) in enumerate(((x, y), (y, x))):
            if ctx.needs_input_grad[i]:
                square = inverse[i].square()
                own = torch.add(r, square, alpha=EPS).mul_(square).mul_(scale)
                whole = torch.empty_like(a)
                for some in _channels(whole, a, b, means[i], means[1 - i], own, other):
                    _write_gradient(some, mask)
                found[i] = whole.unflatten(2, ctx.size)
        return (*found, None, None)


def _moments(
    x: Tensor, y: Tensor, mask: Optional[Tensor], dims: Sequence[int], count: Union[int, Tensor]
) -> Tensor:
    """Means of x, y, cx^2, cy^2 and cx cy over ``dims``: (5, N or 1, C, 1).

    Centred before they are multiplied: a constant map gives zeros, not rounding times 1 / EPS.
    """
    mx, my = (_average(each, mask, dims, count) for each in (x, y))
    sums = []
    for a, b, inside in _positions(x, y, mask):
        cx, cy = precise(a) - mx, precise(b) - my
        if inside is not None:
            cx.mul_(inside)
            cy.mul_(inside)
        squares = [_sum_of_squares(each, dims) for each in (cx, cy)]
        products = cx.mul_(cy).sum(dims, keepdim=True)
        sums.append(torch.stack([*squares, products]))
    return torch.cat([torch.stack([mx, my]), reduce(torch.add, sums) / count])


def _sum_of_squares(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Sum of the squares of ``x`` (N, C, P) over ``dims``."""
    if x.stride(2) != 1:
        return x.square().sum(dims, keepdim=True)
    # Positions that lie side by side are read once, and nothing is written.
    each = torch.linalg.vector_norm(x, dim=2, keepdim=True).square_()
    return each.sum(0, keepdim=True) if 0 in dims else each


def _average(
    x: Tensor, mask: Optional[Tensor], dims: Sequence[int], count: Union[int, Tensor]
) -> Tensor:
    """Mean of a map (N, C, P) over ``dims``, in float32 at least."""
    if mask is None and x.dtype == precision(x):
        # Not x.mean(): on a GPU that multiplies by 1 / count, and constant maps would not give zeros.
        return x.sum(dims, keepdim=True).div_(count)
    # Not by sum's own dtype: on a CPU it converts the whole map first.
    sums = []
    for part, inside in _positions(x, mask):
        exact = precise(part) if inside is None else precise(part) * inside
        sums.append(exact.sum(dims, keepdim=True))
    return reduce(torch.add, sums) / count


def _write_gradient(some: Tuple[Tensor, ...], mask: Optional[Tensor]) -> None:
    """own (a - ma) + other (b - mb), of some channels, into the first of what is given."""
    into, a, b, ma, mb, own, other = some
    for there, part, beside, inside in _positions(into, a, b, mask):
        exact = there if there.dtype == own.dtype else None
        exact = torch.sub(precise(part), ma, out=exact)
        exact.mul_(own).addcmul_(precise(beside) - mb, other)
        if inside is not None:
            exact.mul_(inside)
        if exact is not there:
            there.copy_(exact)


def _channels(x: Tensor, *others: Tensor) -> Iterator[Tuple[Tensor, ...]]:
    """Maps (N, C, P) and numbers (N or 1, C, 1), some channels at a time.

    About as many as are a block where the positions of a channel lie side by side, else all.
    """
    n, c, positions = x.shape
    together = all(each.stride(2) == 1 for each in (x, *others))
    size = max(1, _block(x) // (n * positions)) if together else c
    if size >= c:
        return iter([(x, *others)])
    return zip(*(each.tensor_split(-(-c // size), 1) for each in (x, *others)))


def _positions(*maps: Optional[Tensor]) -> Iterator[Tuple[Optional[Tensor], ...]]:
    """The same positions of each map (N, C, P), a block at a time, so that no temporary is larger."""
    n, c, positions = maps[0].shape
    size = max(1, _block(maps[0]) // (n * c))
    if size >= positions:
        return iter([maps])
    return zip(*(repeat(None) if x is None else x.split(size, 2) for x in maps))


def _block(x: Tensor) -> int:
    return CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK


@dataclass(frozen=True)
class Distance:
    """Mean distance between two maps of one shape, computed in float32 at least.

    Args:
        kind: ``mse``, ``l1``, ``smooth_l1`` (element by element) or ``cosine`` (one minus the cosine
            of the two channel vectors of a position).
        normalize: ``none`` (raw), or scale-free: ``channel``, ``instance``, ``position``.

    Raises:
        ConfigError: unknown name.

    A raw distance grows with its maps; a scale-free one is that of their patterns:

    >>> x = torch.arange(8.0).view(1, 2, 2, 2)
    >>> [round(Distance("mse", how)(x, 10 * x + 3).item(), 3) for how in ("none", "instance")]
    [1615.5, 0.0]
    """

    kind: str = "mse"
    normalize: str = "none"

    def __post_init__(self) -> None:
        check_choice("distance", self.kind, DISTANCES)
        check_choice("normalize", self.normalize, NORMALIZATIONS)

    def __call__(self, x: Tensor, y: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Compare two maps.

        Args:
            x, y: (N, C, H, W) of any floating type.
            mask: (N, 1, H, W), one where a position counts; None counts all.

        Returns:
            scalar tensor.
        """
        if mask is not None:
            mask = mask.to(precision(x))
        if self.kind == "mse" and self.normalize in STATISTICS:
            return _StandardisedMSE.apply(x, y, mask, STATISTICS[self.normalize][:-1])
        x, y = precise(x), precise(y)
        normalize = NORMALIZATIONS[self.normalize]
        each = DISTANCES[self.kind](normalize(x, mask), normalize(y, mask))
        return masked_mean(each, mask)
