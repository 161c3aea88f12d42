"""Making two feature maps comparable without a single parameter."""

from typing import Dict, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .base import precise, precision

__all__ = ["Pooled", "align", "pool_to"]


def pool_to(x: Tensor, size: Tuple[int, ...]) -> Tensor:
    """Average-pool ``x`` (N, C, H, W) to ``size`` = (h, w) with h <= H and w <= W.

    In float32 at least; a map that has that size is returned as it is.
    """
    if x.shape[-2:] == size:
        return x
    if precision(x) != x.dtype:  # image by image: no temporary of full size
        return torch.cat([pool_to(precise(image), size) for image in x.split(1)])
    # Where a side divides, equal windows have the numbers of adaptive pooling, several times faster.
    kernel = tuple(large // s if large % s == 0 else 1 for large, s in zip(x.shape[-2:], size))
    if kernel != (1, 1):
        by_rows = x.device.type == "cpu" and x.stride(-1) == 1
        x = _RowsPooled.apply(x, kernel) if by_rows else F.avg_pool2d(x, kernel, kernel)
    return x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size)


class _RowsPooled(torch.autograd.Function):
    """Means over windows of a map (N, C, H, W) whose rows are contiguous, as sums of whole rows.

    PyTorch's own average pooling takes four times as long on a CPU with channels first.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, kernel: Tuple[int, int]) -> Tensor:
        ctx.kernel = kernel
        rows = _every(x, 2, kernel[0])
        # In place: one side of a kernel is above 1, so that this is no longer the map itself.
        return _every(rows, 3, kernel[1]).div_(kernel[0] * kernel[1])

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tuple[Tensor, None]:
        (n, c, h, w), (below, beside) = gradient.shape, ctx.kernel
        row = (gradient / (below * beside))[..., None].expand(n, c, h, w, beside)
        rows = row.reshape(n, c, h, 1, w * beside).expand(n, c, h, below, w * beside)
        return rows.reshape(n, c, h * below, w * beside), None


def _every(x: Tensor, dim: int, count: int) -> Tensor:
    """Sums of ``count`` neighbours each along ``dim``; of one, the map itself."""
    if count == 1:
        return x
    apart = x.unflatten(dim, (-1, count))
    if count >= 8:  # from here on the faster one
        return apart.sum(dim + 1)
    steps = apart.unbind(dim + 1)
    total = steps[0] + steps[1]
    for step in steps[2:]:
        total += step
    return total


class Pooled:
    """A map at several sizes, each pooled from the smallest one at hand that gives the same numbers.

    Averages of averages are averages where all sizes divide; a map that is wanted at half, a quarter
    and an eighth of its size is then read once, and its gradient written once.

    Args:
        x: (N, C, H, W)
    """

    def __init__(self, x: Tensor):
        self.x = x
        self._even: Dict[Tuple[int, ...], Tensor] = {tuple(x.shape[-2:]): x}

    def to(self, size: Tuple[int, ...]) -> Tensor:
        """The map average-pooled to ``size`` = (h, w)."""
        size = tuple(size)
        if not _divides(size, self.x.shape[-2:]):
            return pool_to(self.x, size)
        if size not in self._even:
            fitting = [s for s in self._even if _divides(size, s)]
            self._even[size] = pool_to(self._even[min(fitting)], size)
        return self._even[size]


def _divides(size: Tuple[int, ...], larger: Tuple[int, ...]) -> bool:
    return larger[0] % size[0] == 0 and larger[1] % size[1] == 0


def align(x: Union[Tensor, Pooled], y: Union[Tensor, Pooled]) -> Tuple[Tensor, Tensor]:
    """Bring two maps to one shape: the larger is average-pooled, the wider is cropped.

    Shared Knowledge Distillation (Electronics 2024, 13(8), 1595): "spatial pooling alignment" and
    channel cropping.  No convolution, no upsampling, no learned weight.

    Args:
        x: (N, C1, H1, W1); a :class:`Pooled` map serves several alignments.
        y: (N, C2, H2, W2)

    Returns:
        both maps as (N, min(C1, C2), min(H1, H2), min(W1, W2)); a map that already has that shape is
        returned as it is, and channels of a tensor are cropped before anything is pooled.

    >>> import torch
    >>> large, wide = torch.arange(16.0).view(1, 1, 4, 4), torch.zeros(1, 8, 2, 2)
    >>> x, y = align(large, wide)
    >>> x.shape == y.shape == (1, 1, 2, 2)
    True
    >>> x.flatten().tolist()
    [2.5, 4.5, 10.5, 12.5]
    """
    shapes = [each.x.shape if isinstance(each, Pooled) else each.shape for each in (x, y)]
    _, channels, *size = map(min, zip(*shapes))
    return _fit(x, channels, tuple(size)), _fit(y, channels, tuple(size))


def _fit(x: Union[Tensor, Pooled], channels: int, size: Tuple[int, ...]) -> Tensor:
    if isinstance(x, Pooled):
        return x.to(size)[:, :channels]
    return pool_to(x[:, :channels], size)
