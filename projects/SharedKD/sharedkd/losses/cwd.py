"""CWD: each channel of the student learns to be active where the teacher's is."""

from typing import Dict, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from sharedkd.values import check_number

from .base import Batch, DistillationLoss

__all__ = ["CWD"]


class CWD(DistillationLoss):
    """Compares where each channel is active: KL divergence of spatial distributions.

    Channel-wise Knowledge Distillation for Dense Prediction (ICCV 2021), as in its public port
    (mmrazor, ``ChannelWiseDivergence``, read)::

        phi(F)_c = softmax over h, w of F_c / tau
        L_l      = tau^2 / (C N) * sum over n, c of KL(phi(T_l)_c || phi(f_l(S_l))_c)

    A constant added to a channel changes nothing; a factor does.  The port has no f_l and needs
    equal widths: the 1x1 convolution where they differ is ours, as is ``ignore_padding``.  Without
    it the distributions extend over the padding, so an image's loss depends on the size of its
    batch's canvas, as in the port; with it the loss is the mean of the images' own losses.  A second
    public version uses weight 5 on four levels, where the port has 10 on all.

    Shapes per level: student (N, C_s, H, W), teacher (N, C_t, H, W).  No parameters where widths
    agree, else C_s*C_t + C_t per level (``adapter=None``).

    Example::

        model.stages.cwd = L(Stage)(loss=L(CWD)(temperature=1.0), weight=10.0)

    Args:
        temperature: tau, above zero; larger: flatter distributions.
        tap, strides: see :class:`DistillationLoss`.
        adapter: f_l, see :func:`~sharedkd.losses.adapter.adapters`.
        ignore_padding: distributions over the positions of the image only.

    Raises:
        ConfigError: a temperature that is not above zero.
    """

    adapts = True

    def __init__(
        self,
        temperature: float,
        tap: str = "fpn",
        strides: Optional[List[int]] = None,
        adapter: Optional[int] = None,
        ignore_padding: bool = False,
    ):
        super().__init__(tap, strides)
        check_number("temperature", temperature, above=0)
        self.temperature = temperature
        self.adapter = adapter
        self.ignore_padding = ignore_padding

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        terms = {}
        for stride, s, t in self.levels(batch):
            mask = batch.inside(s, stride) if self.ignore_padding else None
            s = self._log_phi(self.adapters[str(stride)](s), mask)
            t = self._log_phi(t.detach(), mask)
            divergence = F.kl_div(s, t, reduction="sum", log_target=True)
            terms[f"s{stride}"] = divergence * (self.temperature**2 / (t.shape[0] * t.shape[1]))
        return terms

    def _log_phi(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Logarithm of a map's distributions: (N, C, H, W) -> (N, C, H*W)."""
        x = x / self.temperature
        if mask is not None:
            # not -inf: a probability of zero times an infinite difference would be NaN
            x = x.masked_fill(~mask, torch.finfo(x.dtype).min)
        return F.log_softmax(x.flatten(2), dim=-1)
