"""FRS: the student learns where the teacher's classifier finds something, in a box or not."""

from typing import Dict, FrozenSet, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Batch, DistillationLoss, check_weights, precise

__all__ = ["FRS"]


class FRS(DistillationLoss):
    """Features and class scores, weighted by the feature richness that the teacher's scores show.

    Distilling Object Detectors with Feature Richness (NeurIPS 2021).  For each level, with the dense
    head's logits z (A*K channels), the feature maps F and an adapter f on the student's::

        S          = max over the A*K channels of sigmoid(z_T)                    (N, 1, H, W)
        s8_feature = feature  / sum(S) * sum( S (f(F_S) - F_T)^2 )
        s8_response = response / sum(S) * sum( S BCE(z_S, sigmoid(z_T)) )

    All sums run over the batch, the channels and the positions, sum(S) over batch and positions: a
    term is a mean over positions and a *sum over channels* (256 of F, A*K of z).  Read in the public
    code (duzhixing/FRS, both detectors, and the configs' weights), which computes the BCE on
    sigmoids; here it is computed on logits, the same number, which autocast allows.  A BCE of soft
    targets has its minimum at their entropy, not at zero.  The student of a two-stage detector
    distils its RPN: objectness (K = 1) takes the place of the class scores in both terms.  Padding
    counts, as published.  A level where S underflows to zero everywhere gives zero.

    Parameters: per level 9 * C_s * C_t + C_t (3x3 convolution), 590,080 at 256 channels; five levels
    2,950,400.

    Example::

        model.stages.frs = L(Stage)(loss=L(FRS)(feature=0.005, response=0.02), weight=1.0, ramp=500)

    Args:
        feature, response: the weights of the two terms, 0 or more.
        adapter: kernel of the convolution on the student's maps, see
            :func:`~sharedkd.losses.adapter.adapters`.
        strides: see :class:`DistillationLoss`.

    Raises:
        ConfigError: a negative weight.
    """

    same_head = ("logits",)
    adapts = True

    def __init__(
        self,
        feature: float,
        response: float,
        adapter: Optional[int] = 3,
        strides: Optional[List[int]] = None,
    ):
        super().__init__("fpn", strides)
        check_weights(feature=feature, response=response)
        self.feature = feature
        self.response = response
        self.adapter = adapter

    @property
    def taps(self) -> FrozenSet[str]:
        return frozenset({"fpn", "logits"})

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        terms = {}
        logits = self.levels(batch, "logits")
        for (stride, s, t), (_, z_s, z_t) in zip(self.levels(batch), logits):
            target = z_t.detach().sigmoid()
            richness = target.amax(1, keepdim=True)
            total = richness.sum()
            richness = richness / total.where(total > 0, torch.ones_like(total))
            gap = (precise(self.adapters[str(stride)](s)) - t.detach()).square()
            terms[f"s{stride}_feature"] = self.feature * (gap.sum(1, keepdim=True) * richness).sum()
            terms[f"s{stride}_response"] = self.response * F.binary_cross_entropy_with_logits(
                z_s, target, weight=richness, reduction="sum"
            )
        return terms
