"""Feature fusion: teacher and student maps together make the target of the student."""

from typing import Dict, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from sharedkd.values import check_number

from .base import Batch, DistillationLoss, Shapes, check_weights
from .distance import masked_mean

__all__ = ["FeatureFusion"]


class FeatureFusion(DistillationLoss):
    """Fuses both maps into one that finds objects; the student learns from it and its classifier.

    In the style of Feature Fusion-based Collaborative Learning for knowledge distillation (FFCL,
    Int. J. Distributed Sensor Networks 2021).  Per level, with f an adapter, h a classifier of one
    foreground logit per position, h' = h with its parameters held fixed, and y = 1 where a
    position's centre lies in a ground truth box::

        U          = W [sg(S), T] + b                   # [,]: concatenated channels; W: conv 1x1
        L_fit      = fit      * mean of BCE(h(U), y)
        L_feature  = feature  * mean of (f(S) - sg(U))^2
        L_response = response * mean of BCE(h'(f(S)), sg(sigmoid(h(U))))

    The fit trains fusion and classifier, the other two student and adapter.  W starts as [0 | I]
    and b as 0: the target is exactly the teacher's map at first, and moves off only as far as
    the fit to objects moves it.

    The source's idea (its abstract was read, no code): features of teacher and student are
    concatenated into a more representative map, from which knowledge goes back through features and
    through responses.  There both networks are trained and teach each other, on image
    classification, with a regularisation that is left out here.  OURS is all else: the teacher is
    frozen, so that only the student learns; the fusion per pyramid level, its start, the
    foreground classifier as the response and the three losses.

    Means go over the positions of the batch's images, without padding.  Shapes per level: student
    (N, C_s, H, W), teacher (N, C_t, H, W).  Parameters per level: (C_s + C_t)*C_t + C_t for the
    fusion, C_t + 1 for the classifier, 131,585 at 256 channels, and the adapter's.

    Example::

        model.stages.fusion = L(Stage)(
            loss=L(FeatureFusion)(fit=1.0, feature=1.0, response=1.0), weight=1.0
        )

    Args:
        fit, feature, response: the terms' weights, 0 or more; fit above 0.
        tap, strides: see :class:`DistillationLoss`.
        adapter: f, see :func:`~sharedkd.losses.adapter.adapters`; None: 1x1 where widths differ.

    Raises:
        ConfigError: a weight out of its range.
    """

    needs = frozenset({"teacher", "boxes"})
    adapts = True

    def __init__(
        self,
        fit: float,
        feature: float,
        response: float,
        tap: str = "fpn",
        strides: Optional[List[int]] = None,
        adapter: Optional[int] = None,
    ):
        super().__init__(tap, strides)
        check_number("fit", fit, above=0)  # at 0 the fusion would stay untrained
        check_weights(feature=feature, response=response)
        self.fit = fit
        self.feature = feature
        self.response = response
        self.adapter = adapter

    def bind(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        super().bind(student, teacher, key)
        ours, theirs = student[self.tap], teacher[self.tap]
        self.fusions = nn.ModuleDict({str(s): _fusion(ours[s], theirs[s]) for s in self.strides})
        self.classifiers = nn.ModuleDict({str(s): nn.Conv2d(theirs[s], 1, 1) for s in self.strides})

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        boxes = pad_sequence(batch.boxes, batch_first=True)  # (N, M, 4); a box of zeros is empty
        terms = {}
        for stride, s, t in self.levels(batch):
            classifier, mask = self.classifiers[str(stride)], batch.inside(s, stride)
            adapted = self.adapters[str(stride)](s)
            fused = self.fusions[str(stride)](torch.cat([s.detach(), t.detach()], 1))
            logits = classifier(fused)
            fixed = {name: p.detach() for name, p in classifier.named_parameters()}
            answer = functional_call(classifier, fixed, (adapted,))

            fit = _cross_entropy(logits, in_boxes(boxes, s, stride).to(s.dtype))
            feature = (adapted - fused.detach()).square()
            response = _cross_entropy(answer, logits.detach().sigmoid())
            terms[f"s{stride}_fit"] = self.fit * masked_mean(fit, mask)
            terms[f"s{stride}_feature"] = self.feature * masked_mean(feature, mask)
            terms[f"s{stride}_response"] = self.response * masked_mean(response, mask)
        return terms


def in_boxes(boxes: Tensor, x: Tensor, stride: int) -> Tensor:
    """Find the positions whose centre lies inside a box.

    Args:
        boxes: (N, M, 4) XYXY in pixels, an empty box where an image has fewer than M.
        x: (N, C, H, W) map.
        stride: of the map, in pixels.

    Returns:
        (N, 1, H, W) bool tensor.
    """
    x1, y1, x2, y2 = boxes.unsqueeze(-2).unbind(-1)  # (N, M, 1) each
    rows = (torch.arange(x.shape[-2], device=x.device) + 0.5) * stride
    columns = (torch.arange(x.shape[-1], device=x.device) + 0.5) * stride
    rows, columns = (y1 <= rows) & (rows < y2), (x1 <= columns) & (columns < x2)
    return (rows.unsqueeze(-1) & columns.unsqueeze(-2)).any(1, keepdim=True)


def _fusion(student: int, teacher: int) -> nn.Conv2d:
    """A 1x1 convolution over [student's, teacher's] channels that first returns the teacher's."""
    conv = nn.Conv2d(student + teacher, teacher, 1)
    nn.init.zeros_(conv.bias)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, student:, 0, 0] = torch.eye(teacher)
    return conv


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")
