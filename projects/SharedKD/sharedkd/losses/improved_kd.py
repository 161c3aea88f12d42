"""In the style of Improved KD: several teacher levels for a student level, at drawn positions."""

import math
from typing import Dict, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharedkd.values import check_number

from .adapter import adapters
from .alignment import pool_to
from .base import Batch, DistillationLoss, Shapes

__all__ = ["ImprovedKD"]

EPS = 1e-6  # added to a variance: a constant map has even attention


def attention(x: Tensor) -> Tensor:
    """Spatial attention, a distribution over the positions of each image: (N, C, H, W) -> (N, H*W)."""
    strength = (x.abs().mean(1) + x.abs().amax(1)).flatten(1)
    centred = strength - strength.mean(1, keepdim=True)
    return (centred / (centred.square().mean(1, keepdim=True) + EPS).sqrt()).softmax(1)


class ImprovedKD(DistillationLoss):
    """Compares each student level with neighbouring teacher levels at drawn positions.

    IN THE STYLE OF "An Improved Knowledge Distillation Algorithm and Its Application to Object
    Detection" (CMC 2025, 83(2), 2189-2205), not a reproduction: of the paper only the abstract was
    read, and no public code was found.  The abstract names four parts; this class is our reading of
    three, with s and t strides, N(s) the level s and `reach` levels to either side of it::

        one-to-many Feature Alignment Module: FAM_st(S_s) = resize(conv1x1_st(S_s)) to T_t's size
        spatial attention: a_t(p) = softmax_p(z), z = (m - mean_p m) / sqrt(var_p m + 1e-6),
                           m(p) = mean_c |T_t(c, p)| + max_c |T_t(c, p)|, image by image
        feature resampling: R_t, in each step ceil(samples * H * W) positions of each image, drawn
                            from a_t with replacement, by torch's global generator
        L_s = mean over t in N(s), images, p in R_t and c of (FAM_st(S_s) - T_t)^2

    - Attention reads the mean and the maximum over channels as CBAM (ECCV 2018) does, but of
      absolute values and without its 7x7 convolution: as a weight of the loss a learned attention
      would move to where the loss is small already, and through the draw it would get no gradient.
    - The expectation of L_s over draws is the distance weighted by a_t.  One step compares some of
      the positions, the next step others, instead of the whole map each time.  All student levels
      share the draw of a teacher level.
    - resize is average pooling down and nearest neighbour up.  The mean over N(s), where a sum is
      as plausible, gives the outer levels, with fewer neighbours, the weight of the inner ones.

    The fourth part, class logits split into target and non-target, is a stage of its own:
    :class:`~sharedkd.losses.dkd.DKD` or :class:`~sharedkd.losses.dkd.DenseDKD`.

    Terms: ``s8``, by the student's level.  Parameters: sum over s and t in N(s) of
    C_S(s) * C_T(t) + C_T(t); 855,296 for 5 levels of 256 channels with reach 1 (13 convolutions).

    Example::

        model.stages.features = L(Stage)(loss=L(ImprovedKD)(tap="fpn"), weight=1.0)
        model.stages.logits = L(Stage)(loss=L(DKD)(alpha=1.0, beta=0.25), weight=1.0)

    Args:
        tap, strides: see :class:`DistillationLoss`.
        reach: how many levels in use to either side a student level learns from; 0: its own only.
        samples: positions drawn from a map as a share of its size, above 0 and at most 1.

    Raises:
        ConfigError: an option out of its range.
    """

    def __init__(
        self,
        tap: str = "fpn",
        strides: Optional[List[int]] = None,
        reach: int = 1,
        samples: float = 0.5,
    ):
        super().__init__(tap, strides)
        check_number("reach", reach, least=0, whole=True)
        check_number("samples", samples, above=0, most=1)
        self.reach = reach
        self.samples = samples

    def bind(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        super().bind(student, teacher, key)
        self.fam = nn.ModuleDict()  # student's stride -> teacher's stride -> convolution
        for i, stride in enumerate(self.strides):
            near = self.strides[max(i - self.reach, 0) : i + self.reach + 1]
            ours = dict.fromkeys(near, student[self.tap][stride])
            self.fam[str(stride)] = adapters(1, ours, teacher[self.tap], near, key)

    def draw(self, x: Tensor) -> Tensor:
        """Draw positions of a teacher's map ``x`` (N, C, H, W) for this step.

        Returns:
            (N, 1, H, W), how often each was drawn, as a share of its image's draws.
        """
        draws = math.ceil(self.samples * x[0, 0].numel())
        # Of maps with inf or NaN any position: the term shows it, while CUDA would end the process.
        drawn = torch.multinomial(attention(x).nan_to_num(1.0), draws, replacement=True)
        # Counts, not gathered positions: a gradient without atomic additions is repeatable.
        counts = x.new_zeros(len(x), x[0, 0].numel())
        counts.scatter_add_(1, drawn, counts.new_ones(()).expand_as(drawn))
        return (counts / draws).view_as(x[:, :1])

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        levels = {str(stride): (s, t.detach()) for stride, s, t in self.levels(batch)}
        shares = {stride: self.draw(t) for stride, (_, t) in levels.items()}
        terms = {}
        for stride, near in self.fam.items():
            term = 0
            for k, conv in near.items():
                t = levels[k][1]
                error = (_resized(conv, levels[stride][0], t) - t).square().mean(1, keepdim=True)
                term = term + (shares[k] * error).sum() / len(t)
            terms[f"s{stride}"] = term / len(near)
        return terms


def _resized(conv: nn.Module, x: Tensor, like: Tensor) -> Tensor:
    """conv(x) in the size of ``like``; a 1x1 convolution commutes with both ways to resize."""
    if x.shape[-2:] == like.shape[-2:]:
        return conv(x)
    if x[0, 0].numel() > like[0, 0].numel():
        return conv(pool_to(x, like.shape[-2:]))
    return F.interpolate(conv(x), size=like.shape[-2:], mode="nearest")
