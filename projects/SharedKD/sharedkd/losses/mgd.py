"""MGD: the student's map, with random positions masked out, has to generate the teacher's."""

from typing import Dict, List, Optional

import torch
from torch import Tensor, nn

from sharedkd.values import check_number

from .adapter import adapters
from .base import Batch, DistillationLoss, Shapes, check_weights

__all__ = ["MGD"]


class MGD(DistillationLoss):
    """Masks positions of the student's map; a small network generates the teacher's map from the rest.

    Yang et al., "Masked Generative Distillation" (ECCV 2022).  Per level::

        M    = 0 with probability lambda, else 1; per image and position, the same for all channels
        loss = alpha / N  sum ( T - G( M f(S) ) )^2,   G = conv3x3, ReLU, conv3x3

    with f a 1x1 convolution where widths differ, else nothing.  M is drawn anew in each step, in
    float32 from torch's generator of the map's device.  A sum over space: the value depends on
    resolution.

    Evidence: all read in the authors' code (yzd-v/MGD, ``det/mmdet/distillation/losses/mgd.py``).
    Padding counts as published; ``ignore_padding`` is ours.

    Maps: (N, C_s, H, W) and (N, C_t, H, W).  Parameters of a level: 18 C_t^2 + 2 C_t, 1 180 160 at
    256 channels; where widths differ C_s C_t + C_t more.

    Example::

        model.stages.mgd = L(Stage)(loss=L(MGD)(alpha=2e-5, masked=0.65), weight=1.0)

    Args:
        alpha: factor of the sum.
        masked: lambda, the share of positions that are masked.
        tap, strides: see :class:`DistillationLoss`.
        ignore_padding: mask the batch's padding out of the student's map and leave it out of the
            sum, so that numbers on it have no influence.

    Raises:
        ConfigError: a negative alpha, or a share outside 0..1.
    """

    def __init__(
        self,
        alpha: float,
        masked: float,
        tap: str = "fpn",
        strides: Optional[List[int]] = None,
        ignore_padding: bool = False,
    ):
        super().__init__(tap, strides)
        check_weights(alpha=alpha)
        check_number("masked", masked, least=0, most=1)
        self.alpha = alpha
        self.masked = masked
        self.ignore_padding = ignore_padding

    def bind(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        super().bind(student, teacher, key)
        ours, theirs = student[self.tap], teacher[self.tap]
        self.adapt = adapters(None, ours, theirs, self.strides, key)
        self.generate = nn.ModuleDict()
        for stride in self.strides:
            width = theirs[stride]
            self.generate[str(stride)] = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, width, 3, padding=1),
            )

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        terms = {}
        for stride, s, t in self.levels(batch):
            # float32 whatever the map's type: the same draw for both
            draw = torch.rand(len(s), 1, *s.shape[-2:], dtype=torch.float32, device=s.device)
            keep = draw >= self.masked
            inside = batch.inside(s, stride) if self.ignore_padding else None
            if inside is not None:
                keep = keep & inside
            error = self.generate[str(stride)](self.adapt[str(stride)](s) * keep) - t.detach()
            if inside is not None:
                error = error * inside
            terms[f"s{stride}"] = self.alpha / len(s) * error.square().sum()
        return terms
