"""ReviewKD: the student's levels, fused from the coarsest down, are compared at several scales."""

from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharedkd.values import check_number

from .alignment import pool_to
from .base import Batch, DistillationLoss, Shapes

__all__ = ["ReviewKD"]


class ReviewKD(DistillationLoss):
    """Fuses each student level with all coarser ones and compares it with the teacher's level.

    Distilling Knowledge via Knowledge Review (CVPR 2021), as in its public detection code (read in
    the copy that mdistiller keeps).  Attention based fusion, from the coarsest level down, with
    up = nearest neighbour to the exact size of the finer level::

        x_l = BN(conv1x1(S_l))
        r_l = a * x_l + b * up(r_{l+1}),  (a, b) = sigmoid(conv1x1([x_l, up(r_{l+1})]))
        o_l = BN(conv3x3(r_l))                          coarsest level: r_l = x_l

    and hierarchical context loss, with pool_k = average pooling to k x k::

        L_l = (MSE(o_l, T_l) + 1/2 MSE_4 + 1/4 MSE_2 + 1/8 MSE_1) / (1 + 1/2 + 1/4 + 1/8)
        MSE_k = MSE(pool_k(o_l), pool_k(T_l))

    A pooling to k is left out where k >= h or k >= w; those that remain take the weights 1/2, 1/4,
    ... in turn, and the sum is divided by the weights used.  The public code compares h only, which
    is ours to complete, and fixes the three widths at 256.

    As published the convolutions are followed by BatchNorm on the statistics of the batch, so an
    image's loss depends on the other images of its batch and on the padding.  Where a level has a
    single value per channel (one image, one pixel) there are none: running statistics are used.

    Shapes per level: student (N, C_s, H, W), teacher (N, C_t, H, W).  Parameters, with M
    ``mid_channels``: per level C_s*M + 2*M (1x1 without bias, BN) + 9*M*C_t + 2*C_t (3x3 without
    bias, BN), and 4*M + 2 (1x1 with bias) for every level but the coarsest.  At 256 channels and
    five levels 3,286,024.

    Example::

        model.stages.reviewkd = L(Stage)(loss=L(ReviewKD)(mid_channels=256), weight=1.0)

    Args:
        tap, strides: see :class:`DistillationLoss`.
        mid_channels: width of the fused maps r_l.

    Raises:
        ConfigError: a width below one.
    """

    def __init__(
        self, tap: str = "fpn", strides: Optional[List[int]] = None, mid_channels: int = 256
    ):
        super().__init__(tap, strides)
        check_number("mid_channels", mid_channels, least=1, whole=True)
        self.mid_channels = mid_channels

    def bind(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        super().bind(student, teacher, key)
        ours, theirs, coarsest = student[self.tap], teacher[self.tap], self.strides[-1]
        self.fusions = nn.ModuleDict(
            {
                str(s): Fusion(ours[s], self.mid_channels, theirs[s], s != coarsest)
                for s in self.strides
            }
        )

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        terms, residual = {}, None
        for stride, s, t in reversed(list(self.levels(batch))):
            out, residual = self.fusions[str(stride)](s, residual)
            terms[f"s{stride}"] = hierarchical_context(out, t.detach())
        return dict(reversed(terms.items()))


class Fusion(nn.Module):
    """Fuses a level's map with the fused map of the coarser levels.

    Args:
        student, mid, teacher: channels of the map, of the fused map and of the output.
        fuse: whether there are coarser levels.
    """

    def __init__(self, student: int, mid: int, teacher: int, fuse: bool):
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(student, mid, 1, bias=False), BatchNorm(mid))
        self.attention = nn.Conv2d(2 * mid, 2, 1) if fuse else None
        self.output = nn.Sequential(
            nn.Conv2d(mid, teacher, 3, padding=1, bias=False), BatchNorm(teacher)
        )
        for conv in (self.reduce[0], self.output[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, x: Tensor, residual: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        """Fuse a level's map with the fused map of the next coarser level.

        Args:
            x: (N, C_s, H, W), the student's map.
            residual: (N, M, h, w), the fused map of the next coarser level.

        Returns:
            (N, C_t, H, W), to compare with the teacher's map; (N, M, H, W), the fused map.
        """
        x = self.reduce(x)
        if self.attention is not None:
            residual = F.interpolate(residual, size=x.shape[-2:], mode="nearest")
            a, b = self.attention(torch.cat([x, residual], dim=1)).sigmoid().split(1, dim=1)
            x = a * x + b * residual
        return self.output(x), x


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that uses its running statistics where a channel has a single value.

    A single value has no variance: BatchNorm2d raises in training ("Expected more than 1 value per
    channel").  Running statistics are not updated in that step.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > x.shape[1]:
            return super().forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


def hierarchical_context(x: Tensor, y: Tensor) -> Tensor:
    """Weighted mean of the squared errors of two maps (N, C, H, W) at full size and pooled."""
    total, weight, weights = F.mse_loss(x, y), 1.0, 1.0
    for size in (4, 2, 1):
        if size < min(x.shape[-2:]):
            weight /= 2
            weights += weight
            pooled = (pool_to(x, (size, size)), pool_to(y, (size, size)))
            total = total + weight * F.mse_loss(*pooled)
    return total / weights
