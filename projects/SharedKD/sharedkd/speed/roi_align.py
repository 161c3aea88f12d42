"""RoIAlign in training on a CPU: sums over listed positions, instead of a loop over regions and channels."""

from typing import Optional, Tuple

import torch
from detectron2.layers import ROIAlign
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

__all__ = ["list_positions", "use_listed_positions"]


def use_listed_positions(module: nn.Module) -> int:
    """Let the RoIAlign layers of a network that is trained on a CPU list the positions that they read.

    What RoIAlign (Mask R-CNN, ICCV 2017) gives for a bin of a region is a weighted sum of the map's
    positions, with weights that depend on the region alone.  torchvision works them out anew for
    every channel, and its backward pass runs in one thread.  Listed once, they make both passes a
    sum of whole rows of channels, as of an embedding table: in several threads, and in the memory
    layout of ``channels_last``.  Outputs and gradients are equal up to rounding; with maps of 16 bits,
    regions keep their places, which Detectron2 rounds to 16 bits, too.  In eval mode and on other
    devices nothing changes at all.

    Args:
        module: its Detectron2 ``ROIAlign`` layers are changed in place.

    Returns:
        how many there are.
    """
    layers = [m for m in module.modules() if type(m) is ROIAlign]
    for layer in layers:
        layer.__class__ = _ListedROIAlign
    return len(layers)


class _ListedROIAlign(ROIAlign):
    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """(N, C, H, W) and (R, 5), batch index and XYXY in pixels -> (R, C, h, w)"""
        if not self.training or input.device.type != "cpu" or not rois.isfinite().all():
            return super().forward(input, rois)
        n, c, height, width = input.shape
        x = input if input.dtype == torch.float64 else input.float()
        h, w = _pair(self.output_size)
        positions, weights, starts = list_positions(
            rois.to(x.dtype),
            (height, width),
            (h, w),
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        )
        table = x.permute(0, 2, 3, 1).reshape(n * height * width, c)
        bins = _RowSums.apply(table, positions, weights, starts)
        return bins.view(len(rois), h, w, c).permute(0, 3, 1, 2).to(input.dtype)


class _RowSums(torch.autograd.Function):
    """Weighted sums of rows of ``table`` (P, C): (B, C), one for each of B bins.

    Row ``b`` sums the rows ``positions[starts[b] : starts[b + 1]]``, weighted.  For a gradient, the
    same list is read in the order of its positions, so that no two threads write the same row.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, table: Tensor, positions: Tensor, weights: Tensor, starts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(positions, weights, starts)
        ctx.rows = len(table)
        return _sum_rows(table, positions, weights, starts)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tuple[Optional[Tensor], ...]:
        positions, weights, starts = ctx.saved_tensors
        lengths = torch.diff(starts, append=starts.new_tensor([len(positions)]))
        bins = torch.repeat_interleave(lengths)
        order = positions.argsort(stable=True)
        lengths = torch.bincount(positions, minlength=ctx.rows)
        starts = lengths.cumsum(0) - lengths
        found = _sum_rows(gradient.contiguous(), bins[order], weights[order], starts)
        return found, None, None, None


def _sum_rows(table: Tensor, positions: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    return F.embedding_bag(positions, table, starts, mode="sum", per_sample_weights=weights)


def list_positions(
    rois: Tensor,
    size: Tuple[int, int],
    output_size: Tuple[int, int],
    scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Which positions of a map RoIAlign reads for each bin of each region, and how they weigh.

    A sample's bilinear weights are products of one along each axis, and samples lie on a grid: so
    are the weights of a bin.

    Args:
        rois: (R, 5), finite: index of the image, then XYXY in pixels.
        size: height and width of the map.
        output_size: bins of a region, (h, w).
        scale: the map's size over the image's.
        sampling_ratio: samples of a bin along each axis; 0: one a position, rounded up.
        aligned: pixels are areas, whose centres are half a pixel further.

    Returns:
        ``positions`` (L,), as indices into the (N * H * W) of all maps; ``weights`` (L,);
        ``starts`` (R * h * w,), where the list of each bin begins.
    """
    images, x0, y0, x1, y1 = rois.unbind(1)
    (height, width), (h, w) = size, output_size
    rows, y_weights = _axis(y0, y1, height, h, scale, sampling_ratio, aligned)
    columns, x_weights = _axis(x0, x1, width, w, scale, sampling_ratio, aligned)
    lengths = (rows.lengths[:, :, None] * columns.lengths[:, None, :]).flatten()
    starts = lengths.cumsum(0) - lengths
    bins = torch.repeat_interleave(lengths)
    regions, row_bin, column_bin = bins // (h * w), bins // w % h, bins % w
    row_bin, column_bin = regions * h + row_bin, regions * w + column_bin
    within = torch.arange(len(bins)) - starts[bins]
    per_row = columns.lengths.flatten()[column_bin]
    y = rows.first.flatten()[row_bin] + within // per_row
    x = columns.first.flatten()[column_bin] + within % per_row
    weights = y_weights.view(-1)[row_bin * height + y] * x_weights.view(-1)[column_bin * width + x]
    return (images.long()[regions] * height + y) * width + x, weights, starts


class _Span:
    """The first position that each bin reads along an axis, (R, bins), and how many from there on."""

    def __init__(self, weights: Tensor):
        read = weights != 0
        self.first = read.int().argmax(2)
        last = weights.shape[2] - 1 - read.flip(2).int().argmax(2)
        self.lengths = (last - self.first + 1) * read.any(2)


def _axis(
    start: Tensor,
    end: Tensor,
    length: int,
    bins: int,
    scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tuple[_Span, Tensor]:
    """What each bin reads along one axis, and the weights of all positions there, (R, bins, length)."""
    offset = 0.5 if aligned else 0.0
    start = start * scale - offset
    extent = end * scale - offset - start
    if not aligned:
        extent = extent.clamp(min=1.0)
    step = extent / bins
    grid = torch.full_like(step, sampling_ratio) if sampling_ratio > 0 else step.ceil()
    grid = grid.clamp(min=0)[:, None, None]
    samples = torch.arange(int(grid.max()) if len(grid) else 0, dtype=step.dtype)
    corner = start[:, None] + torch.arange(bins, dtype=step.dtype) * step[:, None]
    at = corner[:, :, None] + (samples + 0.5) * step[:, None, None] / grid.clamp(min=1)
    inside = ((samples < grid) & (at >= -1) & (at <= length)).to(at.dtype)
    at = at.clamp(min=0, max=length - 1)  # beside the outermost centres a map goes on as there
    low = at.long()
    high = (low + 1).clamp(max=length - 1)
    share = (at - low) * inside
    weights = at.new_zeros(*corner.shape, length)
    weights.scatter_add_(2, low, inside - share).scatter_add_(2, high, share)
    weights /= grid.clamp(min=1)
    return _Span(weights), weights
