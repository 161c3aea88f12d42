"""FitNets: the student's maps, adapted to the teacher's width, learn to equal the teacher's."""

from typing import Dict, List, Optional

from torch import Tensor

from .base import Batch, DistillationLoss
from .distance import Distance

__all__ = ["FitNets"]


class FitNets(DistillationLoss):
    """Mean squared error between adapted student maps and the teacher's, level by level.

    FitNets: Hints for Thin Deep Nets (ICLR 2015), the hint loss, recalled from the paper::

        L_l = mean over n, c, h, w of (f_l(S_l) - T_l)^2

    with a learned f_l per level ("hint regressor").  The paper guides one layer of a classifier.
    Taking every level of a pyramid, a plain linear convolution for f_l and the mean instead of half
    the sum is the usual reading for detectors and ours; public classification code (torchdistill)
    puts batch normalisation and ReLU behind the convolution, with which no value below zero could
    be reached, and a pyramid's maps have such values.

    Shapes per level: student (N, C_s, H, W), teacher (N, C_t, H, W).  Parameters per level, in the
    adapter: C_s*C_t + C_t with ``adapter=1`` (65,792 at 256 channels), 9*C_s*C_t + C_t with
    ``adapter=3`` (590,080), none with 0.

    Example::

        model.stages.fitnets = L(Stage)(loss=L(FitNets)(adapter=1), weight=1.0)

    Args:
        tap, strides: see :class:`DistillationLoss`.
        adapter: f_l, see :func:`~sharedkd.losses.adapter.adapters`: kernel size 1 or 3; 0: none;
            None: 1x1 where widths differ.
        ignore_padding: leave positions on the batch's padding out of the mean.
    """

    adapts = True

    def __init__(
        self,
        tap: str = "fpn",
        strides: Optional[List[int]] = None,
        adapter: Optional[int] = 1,
        ignore_padding: bool = False,
    ):
        super().__init__(tap, strides)
        self.adapter = adapter
        self.ignore_padding = ignore_padding
        self.distance = Distance("mse")

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        terms = {}
        for stride, s, t in self.levels(batch):
            mask = batch.inside(s, stride) if self.ignore_padding else None
            terms[f"s{stride}"] = self.distance(self.adapters[str(stride)](s), t.detach(), mask)
        return terms
