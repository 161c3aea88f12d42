"""PKD: the student's maps learn to correlate with the teacher's, whatever their scale."""

from typing import Dict, List, Optional

import torch
from torch import Tensor

from sharedkd.values import check_choice

from .base import Batch, DistillationLoss
from .distance import Distance, masked_mean

__all__ = ["PKD"]

EPS = 1e-6  # added to a standard deviation, as published
STATISTICS = {"batch": (0, 2, 3), "image": (2, 3)}  # what mean and deviation are taken over


class PKD(DistillationLoss):
    """Mean squared error between maps standardised per channel.

    PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient
    (NeurIPS 2022), as in its public code (mmrazor, ``PKDLoss``, read)::

        z(F) = (F - mean(F)) / (std(F) + 1e-6)        per channel, over n, h, w
        L_l  = 1/2 mean over n, c, h, w of (z(f_l(S_l)) - z(T_l))^2

    With the unbiased std over m values this is (m-1)/m * (1 - r), r being Pearson's correlation of
    a channel, averaged over channels (up to the 1e-6).  A positive factor and an offset per channel
    of either map therefore change nothing (of f_l(S_l), where there is an f_l).

    With ``statistics="batch"``, as published, the loss depends on which images share a batch, and
    on their padding, which is counted.  Ours: ``statistics="image"`` (over h, w of each image),
    with which the loss of a batch is the mean of its images' own losses (weighted by their
    positions with ``ignore_padding``); ``ignore_padding``; f_l where widths differ; matching levels
    by stride, where the public code takes the index and resizes.  A channel of a single value has
    z = 0, where the public code has NaN.  A constant channel has z = 0 too.  Its gradient is finite,
    but large where the channel is the student's: 1/std is then 1e6, as published.

    Shapes per level: student (N, C_s, H, W), teacher (N, C_t, H, W).  No parameters where widths
    agree, else C_s*C_t + C_t per level (``adapter=None``).

    Example::

        model.stages.pkd = L(Stage)(loss=L(PKD)(strides=[4, 8, 16, 32]), weight=6.0)

    Args:
        tap, strides: see :class:`DistillationLoss`.
        statistics: ``batch`` or ``image``.
        adapter: f_l, see :func:`~sharedkd.losses.adapter.adapters`.
        ignore_padding: leave positions on the batch's padding out of statistics and mean.

    Raises:
        ConfigError: unknown name.
    """

    adapts = True

    def __init__(
        self,
        tap: str = "fpn",
        strides: Optional[List[int]] = None,
        statistics: str = "batch",
        adapter: Optional[int] = None,
        ignore_padding: bool = False,
    ):
        super().__init__(tap, strides)
        check_choice("statistics", statistics, STATISTICS)
        self.statistics = statistics
        self.adapter = adapter
        self.ignore_padding = ignore_padding
        self.distance = Distance("mse")

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        terms = {}
        for stride, s, t in self.levels(batch):
            mask = batch.inside(s, stride) if self.ignore_padding else None
            mask = None if mask is None else mask.to(s.dtype)
            s = self._standardise(self.adapters[str(stride)](s), mask)
            t = self._standardise(t.detach(), mask)
            terms[f"s{stride}"] = self.distance(s, t, mask) / 2
        return terms

    def _standardise(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        """z of a map (N, C, H, W); zero where the mask (N, 1, H, W) is zero."""
        dims = STATISTICS[self.statistics]
        centred = x - masked_mean(x, mask, dims, keepdim=True)
        if mask is None:
            freedom = max(x[:, :1].numel() // (1 if 0 in dims else len(x)) - 1, 1)
        else:
            centred = centred * mask
            freedom = (mask.sum(dims, keepdim=True) - 1).clamp(min=1)
        variance = centred.square().sum(dims, keepdim=True) / freedom
        # The clamp gives the root of a constant channel a gradient of zero instead of infinity.
        return centred / (variance.clamp(min=torch.finfo(x.dtype).tiny).sqrt() + EPS)
