"""How far apart two aligned maps are: four distances, each raw or scale-free."""

from dataclasses import dataclass
from typing import Callable, Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .base import precise

__all__ = ["Distance", "DISTANCES", "NORMALIZATIONS"]

EPS = 1e-6  # added to a variance: a constant map has a gradient of zero, not NaN


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
    """The mean squared error of two standardised maps, which are never kept standardised.

    With cx = x - mean(x), vx = mean(cx^2), sx = sqrt(vx + EPS), the same of y, z = cx/sx - cy/sy and
    P positions per mean::

        L = sum(z^2) / (positions * channels)
        dL/dx = 2 / (positions * channels) * (z / sx - mean(z cx) / sx^3 * cx)

    The gradient is a sum of x and y with factors per channel: autograd's own way through the same
    formula keeps and reads several maps of full size for each of these two.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, mask: Optional[Tensor], dims: Sequence[int]) -> Tensor:
        if mask is None:
            total = x.numel() // x.shape[1]
            count = total if 0 in dims else total // len(x)
        else:
            count = mask.sum(dims, keepdim=True).clamp(min=1)
            total = mask.sum().clamp(min=1)
        # Centred before it is scaled: a constant map gives zeros, not rounding times 1 / EPS.
        mx, my = (_mean(each, mask, dims) for each in (x, y))
        cx, cy = x - mx, y - my
        sx, sy = (
            (_square_sum_(each.clone(), mask, dims) / count + EPS).sqrt() for each in (cx, cy)
        )
        z = cx.div_(sx).addcmul_(cy, -1 / sy)
        squares = _square_sum_(z, mask, dims)
        ctx.save_for_backward(x, y, mask, mx, my, sx, sy, squares / count)
        ctx.scale = 2 / (total * x.shape[1])
        return squares.sum() * ctx.scale / 2

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, y, mask, mx, my, sx, sy, square = ctx.saved_tensors
        # Standardised variances are 1 but for EPS; mean(z^2) = ux + uy - 2 mean(cx cy) / (sx sy).
        ux, uy = 1 - EPS / sx.square(), 1 - EPS / sy.square()
        product = (ux + uy - square) / 2
        scale = gradient * ctx.scale
        found = []
        for needed, a, ma, sa, ua, b, mb, sb in (
            (ctx.needs_input_grad[0], x, mx, sx, ux, y, my, sy),
            (ctx.needs_input_grad[1], y, my, sy, uy, x, mx, sx),
        ):
            if not needed:
                found.append(None)
                continue
            own = scale * (1 - ua + product) / sa.square()
            other = -scale / (sa * sb)
            each = (a - ma).mul_(own).addcmul_(b - mb, other)
            found.append(each if mask is None else each.mul_(mask))
        return (*found, None, None)


def _square_sum_(x: Tensor, mask: Optional[Tensor], dims) -> Tensor:
    """Of a map that nobody needs any more."""
    if mask is not None:
        x.mul_(mask)
    return x.square_().sum(dims, keepdim=True)


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
