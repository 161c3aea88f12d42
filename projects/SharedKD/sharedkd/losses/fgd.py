"""FGD: features weighted by boxes and attention (focal), and their global context (global)."""

from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sharedkd.values import check_number

from .adapter import adapters
from .base import Batch, DistillationLoss, Shapes, check_weights

__all__ = ["FGD", "GlobalContext", "box_weights"]

CHUNK = 32  # boxes of an image that are drawn at a time: bounds the memory of a crowded batch


def box_weights(boxes: Tensor, x: Tensor, stride: int) -> Tensor:
    """Draw the boxes: at each position 1 / (cells of the smallest box there), 0 without a box.

    A box covers the cells floor(x0 / stride) to ceil(x1 / stride), both included, and likewise in
    y: about one cell more on the right and the bottom than it touches, as in the public code.

    Args:
        boxes: (N, B, 4) XYXY in pixels, B >= 1; minus infinity where an image has fewer.
        x: (N, C, H, W) map.
        stride: of the map, in pixels.

    Returns:
        (N, 1, H, W) in the type of ``x``.
    """
    height, width = x.shape[-2:]

    def along(axis: int, size: int) -> Tuple[Tensor, Tensor]:
        """Which cells of a row (axis 0) or column (1) a box covers (N, B, size), and how many."""
        low, high = (boxes[..., axis] / stride).floor(), (boxes[..., axis + 2] / stride).ceil()
        cell = torch.arange(size, device=x.device)
        covers = (low.unsqueeze(-1) <= cell) & (cell <= high.unsqueeze(-1))
        # A box up to the edge has size as its last cell, beyond the map: as in the public code.
        return covers, (high.clamp(0, size) - low.clamp(0, size) + 1).to(x.dtype)

    (columns, across), (rows, down) = along(0, width), along(1, height)
    rows = rows / (across * down).unsqueeze(-1)
    mask = x.new_zeros(x.shape[0], height, width)
    for r, c in zip(rows.split(CHUNK, 1), columns.split(CHUNK, 1)):
        mask = torch.maximum(mask, (r.unsqueeze(-1) * c.unsqueeze(-2)).amax(1))
    return mask.unsqueeze(1)


class GlobalContext(nn.Module):
    """Computes what a GcBlock (Cao et al., ICCV workshops 2019) adds to a map: a vector per image::

        context = sum_hw softmax_hw( conv_mask(x) ) x
        output  = conv( ReLU( LayerNorm( conv(context) ) ) )

    (N, C, H, W) -> (N, C, 1, 1), zero at the start; 2 C c + 3 c + 2 C + 1 parameters with
    c = max(C // 2, 1).

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = max(channels // 2, 1)
        self.mask = nn.Conv2d(channels, 1, 1)
        self.add = nn.Sequential(
            nn.Conv2d(channels, inner, 1),
            nn.LayerNorm([inner, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, channels, 1),
        )
        nn.init.kaiming_normal_(self.mask.weight, nonlinearity="relu")
        for p in (self.mask.bias, *self.add[-1].parameters()):
            nn.init.zeros_(p)

    def forward(self, x: Tensor, inside: Optional[Tensor]) -> Tensor:
        """Compute the vector of each image of ``x`` from the positions ``inside``.

        Args:
            x: (N, C, H, W)
            inside: (N, 1, H, W) bool; None: all positions.

        Returns:
            (N, C, 1, 1)
        """
        score = self.mask(x)
        if inside is not None:
            score = score.masked_fill(~inside, float("-inf"))
        context = x.flatten(2) @ score.flatten(2).softmax(2).transpose(1, 2)
        return self.add(context.unsqueeze(-1))


class FGD(DistillationLoss):
    """Weights the squared difference of maps by boxes and by the teacher's attention.

    Yang et al., "Focal and Global Knowledge Distillation for Detectors" (CVPR 2022).  Per level,
    S the student's map (through a 1x1 convolution where widths differ), T the teacher's::

        A^s(F) = H W softmax_hw( mean_c |F| / T ),   A^c(F) = C softmax_c( mean_hw |F| / T )
        M_fg   = 1 / (cells of the smallest box there), or 0;   M_bg = 1 / #background, or 0
        foreground = foreground / N  sum M_fg A^s(T) A^c(T) (T - S)^2
        background = background / N  sum M_bg A^s(T) A^c(T) (T - S)^2
        attention  = attention  / N  ( sum |A^c(S) - A^c(T)| + sum |A^s(S) - A^s(T)| )
        global     = global_    / N  sum ( R_S(S) - R_T(T) )^2,   R(F) = F + GlobalContext(F)

    The paper calls the weights alpha, beta, gamma, lambda.  R_S and R_T both learn, so the target
    moves; at the start both are the identity.  Sums over space: values depend on resolution.

    Evidence: all read in the authors' code (yzd-v/FGD, ``mmdet/distillation/losses/fgd.py``), the
    teacher's attention on both sides of the focal terms too.  Deviation: boxes are divided by the
    stride; the authors scale them by map size over unpadded image size, which stretches them on
    padded images.  Padding is background as published; ``ignore_padding`` is ours.

    Maps: (N, C_s, H, W) and (N, C_t, H, W).  Parameters of a level, with C = C_t and
    c = max(C // 2, 1): 2 (2 C c + 3 c + 2 C + 1), 132 866 at 256 channels; where widths differ
    C_s C + C more.

    Example::

        model.stages.fgd = L(Stage)(
            loss=L(FGD)(foreground=5e-5, background=2.5e-5, attention=5e-5, global_=5e-7,
                        strides=[4, 8, 16, 32]),
            weight=1.0,
        )

    Args:
        foreground, background, attention, global_: weights of the four terms ``s8_foreground``, ...
        tap, strides: see :class:`DistillationLoss`.
        temperature: T; larger is more even.
        ignore_padding: leave the batch's padding out of masks, attention, context and sums, so that
            numbers on it have no influence.

    Raises:
        ConfigError: a negative weight or a temperature that is not positive.
    """

    needs = frozenset({"teacher", "boxes"})

    def __init__(
        self,
        foreground: float,
        background: float,
        attention: float,
        global_: float,
        tap: str = "fpn",
        strides: Optional[List[int]] = None,
        temperature: float = 0.5,
        ignore_padding: bool = False,
    ):
        super().__init__(tap, strides)
        self.weights = dict(
            foreground=foreground, background=background, attention=attention, global_=global_
        )
        check_weights(**self.weights)
        check_number("temperature", temperature, above=0)
        self.temperature = temperature
        self.ignore_padding = ignore_padding

    def bind(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        super().bind(student, teacher, key)
        ours, theirs = student[self.tap], teacher[self.tap]
        self.adapt = adapters(None, ours, theirs, self.strides, key)
        self.student_context, self.teacher_context = nn.ModuleDict(), nn.ModuleDict()
        for stride in self.strides:
            self.student_context[str(stride)] = GlobalContext(theirs[stride])
            self.teacher_context[str(stride)] = GlobalContext(theirs[stride])

    def _attention(self, x: Tensor, inside: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        """Compute A^s (N, 1, H, W) and A^c (N, C, 1, 1)."""
        magnitude = x.abs()
        spatial = magnitude.mean(1, keepdim=True) / self.temperature
        if inside is None:
            count = x.shape[2] * x.shape[3]
            channel = magnitude.mean((2, 3), keepdim=True)
        else:
            count = inside.sum((2, 3), keepdim=True)
            channel = (magnitude * inside).sum((2, 3), keepdim=True) / count
            spatial = spatial.masked_fill(~inside, float("-inf"))
        spatial = spatial.flatten(2).softmax(2).view_as(spatial) * count
        return spatial, (channel / self.temperature).softmax(1) * x.shape[1]

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        # One box more than the fullest image has, so that there is a box to take the maximum of.
        boxes = pad_sequence(batch.boxes, batch_first=True, padding_value=float("-inf"))
        boxes = F.pad(boxes, (0, 0, 0, 1), value=float("-inf"))
        terms = {}
        for stride, s, t in self.levels(batch):
            name, t = str(stride), t.detach()
            s = self.adapt[name](s)
            inside = batch.inside(s, stride) if self.ignore_padding else None

            fg = box_weights(boxes, t, stride)
            bg = (fg == 0) if inside is None else (fg == 0) & inside
            bg = bg.to(t.dtype) / bg.sum((2, 3), keepdim=True).clamp(min=1)

            spatial_s, channel_s = self._attention(s, inside)
            spatial_t, channel_t = self._attention(t, inside)
            difference = s - t
            focal = (difference.square() * channel_t).sum(1, keepdim=True) * spatial_t
            shift = self.student_context[name](s, inside) - self.teacher_context[name](t, inside)
            relation = (difference + shift).square()
            if inside is not None:
                relation = relation * inside

            sums = dict(
                foreground=(fg * focal).sum(),
                background=(bg * focal).sum(),
                attention=(channel_s - channel_t).abs().sum() + (spatial_s - spatial_t).abs().sum(),
                global_=relation.sum(),
            )
            for part, value in sums.items():
                terms[f"s{stride}_{part.rstrip('_')}"] = self.weights[part] / len(s) * value
        return terms
