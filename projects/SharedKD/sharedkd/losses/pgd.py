"""PGD: features weighted by where the teacher predicts each object best."""

from math import log2
from typing import Dict, FrozenSet, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sharedkd.values import check_number

from .adapter import adapters
from .base import Batch, DistillationLoss, Shapes, check_weights

__all__ = ["PGD", "gaussian", "quality"]

CHUNK = 32  # boxes of an image at a time: bounds the memory of a crowded batch
# In pixels^2: the variance that the authors' noise adds, uniform within 0.1 pixels.
JITTER = 0.1**2 / 12


def quality(
    scores: Tensor, predicted: Tensor, boxes: Tensor, classes: Tensor, xi: Sequence[float]
) -> Tensor:
    """How well each position predicts each object, q = score^(1 - xi) IoU^xi; its best anchor counts.

    Args:
        scores: (N, A, K, R) class scores of R positions.
        predicted: (N, A, R, 4) boxes, XYXY.
        boxes, classes: (N, B, 4) and (N, B) of the objects; a box of zeros is none.
        xi: X numbers between 0 and 1.

    Returns:
        (X, N, B, R)
    """
    best = scores.new_zeros(len(xi), *classes.shape, scores.shape[-1])
    low, high = boxes.unsqueeze(2).split(2, -1)
    area = (high - low).prod(-1)
    index = classes.unsqueeze(-1).expand(best.shape[1:])
    for score, box in zip(scores.unbind(1), predicted.unbind(1)):
        x, y = box.unsqueeze(1).split(2, -1)
        both = (torch.minimum(y, high) - torch.maximum(x, low)).clamp(min=0).prod(-1)
        either = area + (y - x).clamp(min=0).prod(-1) - both
        iou, score = both / either.clamp(min=1e-6), score.gather(1, index)
        best = torch.maximum(best, torch.stack([score ** (1 - p) * iou**p for p in xi]))
    return best


def gaussian(found: Tensor, centres: Tensor, positions: int) -> Tensor:
    """Weights about the best positions of each object: the Gaussian that fits them, elsewhere 0.

    Args:
        found: (..., R) :func:`quality`, 0 where a position cannot count.
        centres: (R, 2) of the positions, in pixels.
        positions: how many count at most.

    Returns:
        (..., R), at most 1.
    """
    best, where = found.topk(min(positions, found.shape[-1]))
    # float64: the covariance of a line is almost singular.
    counted = (best > 0).double().unsqueeze(-1)
    points = centres.double()[where]  # (..., positions, 2)
    count = counted.sum(-2, keepdim=True).clamp(min=1)
    apart = points - (counted * points).sum(-2, keepdim=True) / count
    spread = (counted * apart).transpose(-1, -2) @ apart / count
    (xx, xy), (_, yy) = (row.split(1, -1) for row in spread.unbind(-2))
    xx, yy = xx + JITTER, yy + JITTER
    dx, dy = apart.unbind(-1)
    distance = (yy * dx**2 - 2 * xy * dx * dy + xx * dy**2) / (xx * yy - xy**2)
    weights = (-distance / 2).exp() * counted.squeeze(-1)
    return torch.zeros_like(found).scatter(-1, where, weights.to(found.dtype))


class PGD(DistillationLoss):
    """Weights the squared difference of maps by where the teacher predicts each object best.

    Prediction-Guided Distillation for Dense Object Detection (ECCV 2022).  The quality of a position of any
    level for an object whose box holds its centre is ``score^(1 - xi) IoU^xi``, with the teacher's score of
    the object's class and the IoU of the teacher's box.  M is, over the best ``positions`` of an object, the
    Gaussian of maximum likelihood through them; 0 elsewhere; the largest of all objects.  M_c has xi
    ``xi_score``, M_b has ``xi_box``.  Per level l, with S and T the maps,
    ``P = H W softmax_hw(mean_c |F| / t)`` and ``A = C softmax_c(|F| / t)`` at each position::

        foreground = foreground w_l / N sum of M_c / #(M_c > 0) P(T) A(T) (T - S)^2
        background = background w_l / N sum of M_0 / #M_0       P(T) A(T) (T - S)^2
        box        = box mean over positions with M_b > 0 of M_b mean_c( A(T) (T - S)^2 )
        attention  = attention ( sum |A(S) - A(T)| / (N H W) + sum |P(S) - P(T)| / N
                                 + sum where M_b > 0 of |A(S) - A(T)| / #(M_b > 0) )

    M_0 is 1 outside of all boxes, # counts in an image (``box``: in the batch), w_l = 1 + growth log2(stride
    over that of the finest level).  The paper calls the weights alpha, beta, gamma, delta.

    Evidence: the paper, and the authors' code (ChenhongyiYang/PGD) for norms, attention and the configs'
    numbers.  Theirs compares the maps after the first convolution of each branch of the head; here it is
    the FPN's, as heads differ, whose scale may ask for other weights than the published
    (``weight="auto"``).  The best positions are of those inside a box, as the paper has it; its code
    drops those outside afterwards.  The code adds noise to positions, so that the covariance can be
    inverted; here it is the noise's variance.  OURS: of several anchors at a position the best counts;
    for two-stage students the RPN is the dense head, and its objectness the score; padding has no part in
    P, M_0 and H W.

    Parameters: none where widths agree, else a 1x1 convolution a level, C_s C_t + C_t.

    Example::

        model.stages.pgd = L(Stage)(
            loss=L(PGD)(foreground=0.04, background=0.02, box=0.064, attention=8e-4), weight=1.0
        )

    Args:
        foreground, background, box, attention: weights of the four terms ``s8_foreground``, ...
        positions: how many of an object's best positions count.
        xi_score, xi_box: from 0, the score alone, to 1, the IoU alone.
        growth: how much more each coarser level counts in ``foreground`` and ``background``.
        temperature: t, above 0.
        strides: see :class:`DistillationLoss`.

    Raises:
        ConfigError: a number out of its range.
    """

    needs = frozenset({"teacher", "boxes"})
    guides = frozenset({"logits", "boxes"})
    same_head = ("logits",)

    def __init__(
        self,
        foreground: float,
        background: float,
        box: float,
        attention: float,
        positions: int = 30,
        xi_score: float = 0.8,
        xi_box: float = 0.6,
        growth: float = 0.25,
        temperature: float = 0.8,
        strides: Optional[List[int]] = None,
    ):
        super().__init__("fpn", strides)
        self.weights = dict(
            foreground=foreground, background=background, box=box, attention=attention
        )
        check_weights(**self.weights)
        check_number("positions", positions, least=1, whole=True)
        for key, xi in (("xi_score", xi_score), ("xi_box", xi_box)):
            check_number(key, xi, least=0, most=1)
        check_number("growth", growth, least=0)
        check_number("temperature", temperature, above=0)
        self.positions, self.xi, self.growth = positions, (xi_score, xi_box), growth
        self.temperature = temperature

    @property
    def taps(self) -> FrozenSet[str]:
        return frozenset({"fpn", "logits", "boxes"})

    def bind(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        super().bind(student, teacher, key)
        self.adapt = adapters(None, student["fpn"], teacher["fpn"], self.strides, key)

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        terms = {}
        levels = zip(self.levels(batch), *self._masks(batch))
        for (stride, s, t), by_score, by_box, outside in levels:
            s, t = self.adapt[str(stride)](s), t.detach()
            inside = batch.inside(s, stride)
            inside = torch.ones_like(outside) if inside is None else inside.to(t.dtype)
            outside = outside * inside
            count, images = inside.sum((2, 3), keepdim=True), len(s)
            channel_s, channel_t = self._channels(s), self._channels(t)
            spatial_s, spatial_t = (self._positions(x, inside, count) for x in (s, t))
            weighted = channel_t * (s - t).square()
            focal = weighted.sum(1, keepdim=True) * spatial_t
            moved = (channel_s - channel_t).abs().sum(1, keepdim=True)
            there = (by_box > 0).to(t.dtype)
            boxes = there.sum().clamp(min=1)
            level = 1 + self.growth * log2(stride / self.strides[0])
            sums = dict(
                foreground=level * (_share(by_score) * focal).sum() / images,
                background=level * (_share(outside) * focal).sum() / images,
                box=(by_box * weighted.mean(1, keepdim=True)).sum() / boxes,
                attention=(moved * inside / count).sum() / images
                + (spatial_s - spatial_t).abs().sum() / images
                + (moved * there).sum() / boxes,
            )
            for part, value in sums.items():
                terms[f"s{stride}_{part}"] = self.weights[part] * value
        return terms

    def _channels(self, x: Tensor) -> Tensor:
        """A of a map, (N, C, H, W)."""
        return x.shape[1] * (x.abs() / self.temperature).softmax(1)

    def _positions(self, x: Tensor, inside: Tensor, count: Tensor) -> Tensor:
        """P of a map, (N, 1, H, W); 0 where it is not ``inside``."""
        mean = x.abs().mean(1, keepdim=True) / self.temperature
        mean = mean.masked_fill(inside == 0, float("-inf"))
        return count * mean.flatten(2).softmax(2).view_as(mean)

    @torch.no_grad()
    def _masks(self, batch: Batch) -> Tuple[List[Tensor], ...]:
        """M_c, M_b and M_0 of each level, (N, 1, H, W)."""
        centres, sizes, scores, predicted = [], [], [], []
        maps = zip(self.levels(batch, "logits"), self.levels(batch, "boxes"))
        for (stride, _, z), (_, _, b) in maps:
            anchors = b.shape[1] // 4
            scores.append(z.sigmoid().unflatten(1, (anchors, -1)).flatten(3))
            predicted.append(b.unflatten(1, (anchors, 4)).flatten(3).transpose(2, 3))
            y, x = ((torch.arange(n, device=z.device) + 0.5) * stride for n in z.shape[-2:])
            grid = torch.meshgrid(y, x, indexing="ij")[::-1]
            centres.append(torch.stack(grid, -1).flatten(0, 1).to(z.dtype))
            sizes.append(z.shape[-2:])
        points = torch.cat(centres)
        # One box at least, of zeros, so that there is one to take the maximum of.
        boxes = pad_sequence([*batch.boxes, points.new_zeros(1, 4)], batch_first=True)[:-1]
        classes = pad_sequence([*batch.classes, boxes.new_zeros(1).long()], batch_first=True)[:-1]
        classes = classes if scores[0].shape[2] > 1 else torch.zeros_like(classes)
        guides = points.new_zeros(2, len(boxes), len(points))
        outside = torch.ones_like(guides[0])
        for some, kinds in zip(boxes.to(points.dtype).split(CHUNK, 1), classes.split(CHUNK, 1)):
            low, high = some.unsqueeze(2).split(2, -1)
            within = ((points > low) & (points < high)).all(-1)  # (N, B, R)
            each = zip(scores, predicted)
            q = torch.cat([quality(p, b, some, kinds, self.xi) for p, b in each], -1) * within
            guides = torch.maximum(guides, gaussian(q, points, self.positions).amax(2))
            outside = outside * ~within.any(1)
        counts = [h * w for h, w in sizes]
        return tuple(
            [x.view(-1, 1, *size) for x, size in zip(mask.split(counts, 1), sizes)]
            for mask in (*guides, outside)
        )


def _share(mask: Tensor) -> Tensor:
    """A mask over how many positions of the image it has."""
    return mask / (mask > 0).sum((2, 3), keepdim=True).clamp(min=1)
