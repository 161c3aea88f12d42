"""How far apart two aligned maps are: four distances, each raw or scale-free."""

from dataclasses import dataclass
from itertools import product
from typing import Callable, Dict, Iterator, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .base import precise

__all__ = ["Distance", "DISTANCES", "NORMALIZATIONS"]

EPS = 1e-6  # added to a variance: a constant map has a gradient of zero, not NaN
CACHED = 2**20  # bytes of a map that stay in the caches of a CPU with what is computed of them


def _mean(x: Tensor, mask: Optional[Tensor], dims) -> Tensor:
    """Mean of x over dims, counting only where mask (N, 1, H, W) is one."""
    if mask is None:
        return x.mean(dims, keepdim=True)
    count = mask.expand_as(x[:, :1]).sum(dims, keepdim=True) * (x.shape[1] if 1 in dims else 1)
    return (x * mask).sum(dims, keepdim=True) / count.clamp(min=1)


def _standardise(x: Tensor, mask: Optional[Tensor], dims) -> Tensor:
    centred = x - _mean(x, mask, dims)
    return centred / (_mean(centred.square(), mask, dims) + EPS).sqrt()


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
    """The mean squared error of two standardised maps, which are never written.

    With cx = x - mean(x), vx = mean(cx^2), sx = sqrt(vx + EPS), the same of y, and
    r = mean(cx cy) / (sx sy), over the P positions of a mean::

        mean((cx/sx - cy/sy)^2) = vx/sx^2 + vy/sy^2 - 2 r
        dL/dx = 2 / (positions * channels) * ((1 - vx/sx^2 + r) / sx^2 * cx - cy / (sx sy))

    Both maps are read twice here and once for a gradient, which is all that is written.  Autograd's
    own way through the same formula writes and reads some thirty maps of full size.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, mask: Optional[Tensor], dims: Sequence[int]) -> Tensor:
        if mask is None:
            total = x.numel() // x.shape[1]
            count = total if 0 in dims else total // len(x)
        else:
            count = mask.sum(dims, keepdim=True).clamp(min=1)
            total = mask.sum().clamp(min=1)
        mx, my = (_mean(each, mask, dims) for each in (x, y))
        sums = x.new_zeros(3, *x.shape[:2], 1, 1)
        for images, rows in _blocks(x):
            # Centred before they are multiplied: a constant map gives zeros, not rounding times 1 / EPS.
            cx, cy = (_centred(each, mean, images, rows) for each, mean in ((x, mx), (y, my)))
            if mask is not None:
                cx.mul_(mask[images, :, rows])
                cy.mul_(mask[images, :, rows])
            for into, each in zip(sums, (cx * cy, cx.square_(), cy.square_())):
                into[images] += each.sum((2, 3), keepdim=True)
        if 0 in dims:
            sums = sums.sum(1, keepdim=True)
        covariance, vx, vy = sums / count
        sx, sy = (vx + EPS).sqrt(), (vy + EPS).sqrt()
        ux, uy, r = vx / sx.square(), vy / sy.square(), covariance / (sx * sy)
        ctx.save_for_backward(x, y, mask, mx, my, sx, sy, ux, uy, r)
        ctx.scale = 2 / (total * x.shape[1])
        # Of equal maps the difference is zero but for rounding.
        return ((ux + uy - 2 * r).clamp(min=0) * count).sum() * ctx.scale / 2

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, y, mask, mx, my, sx, sy, ux, uy, r = ctx.saved_tensors
        scale = gradient * ctx.scale
        other = (-scale / (sx * sy)).expand(len(x), -1, -1, -1)
        found = []
        for needed, a, ma, sa, ua, b, mb in (
            (ctx.needs_input_grad[0], x, mx, sx, ux, y, my),
            (ctx.needs_input_grad[1], y, my, sy, uy, x, mx),
        ):
            if not needed:
                found.append(None)
                continue
            own = (scale * (1 - ua + r) / sa.square()).expand(len(a), -1, -1, -1)
            each = torch.empty_like(a)
            for images, rows in _blocks(a):
                part = _centred(a, ma, images, rows, out=each[images, :, rows])
                part.mul_(own[images]).addcmul_(_centred(b, mb, images, rows), other[images])
                if mask is not None:
                    part.mul_(mask[images, :, rows])
            found.append(each)
        return (*found, None, None)


def _centred(
    x: Tensor, mean: Tensor, images: slice, rows: slice, out: Optional[Tensor] = None
) -> Tensor:
    mean = mean.expand(len(x), -1, -1, -1)[images]
    return torch.sub(x[images, :, rows], mean, out=out)


def _blocks(x: Tensor) -> Iterator[Tuple[slice, slice]]:
    """Images and rows of a map (N, C, H, W), as many at a time as a core's cache holds.

    A GPU takes the map whole.
    """
    n, c, h, w = x.shape
    if x.is_cuda:
        yield slice(n), slice(h)
        return
    rows = max(1, CACHED // (c * w * x.element_size()))
    images = max(1, rows // h)
    for i, j in product(range(0, n, images), range(0, h, rows)):
        yield slice(i, i + images), slice(j, j + rows)


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

    def __post_init__(self):
        for key, value, known in (
            ("distance", self.kind, DISTANCES),
            ("normalize", self.normalize, NORMALIZATIONS),
        ):
            if value not in known:
                raise ConfigError(key, value, "no such name", f"use one of {', '.join(known)}")

    def __call__(self, x: Tensor, y: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            x, y: (N, C, H, W) of any floating type.
            mask: (N, 1, H, W), one where a position counts; None counts all.

        Returns:
            scalar tensor.
        """
        x, y = precise(x), precise(y)
        mask = None if mask is None else mask.to(x.dtype)
        if self.kind == "mse" and self.normalize in STATISTICS:
            return _StandardisedMSE.apply(x, y, mask, STATISTICS[self.normalize])
        normalize = NORMALIZATIONS[self.normalize]
        each = DISTANCES[self.kind](normalize(x, mask), normalize(y, mask))
        return _mean(each, mask, (0, 1, 2, 3)).view(())
