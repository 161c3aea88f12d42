"""BCKD: binary scores of all classes and boxes of a dense head, weighted by disagreement."""

from typing import Dict, FrozenSet, List, Optional

import torch.nn.functional as F
from torch import Tensor

from .base import Batch, DistillationLoss, check_weights
from .dense import giou, number_of_foreground, on_images

__all__ = ["BCKD"]


class BCKD(DistillationLoss):
    """Compares each class score of a one-stage head as a binary one, and the boxes by their overlap.

    Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection (ICCV 2023).  Over
    the anchors i and classes k of a level, with p = sigmoid(z) and boxes b::

        w_ik         = |p_T,ik - p_S,ik|
        s8_score     = score   / F * sum over i and k of w_ik BCE(z_S,ik, p_T,ik)
        s8_overlap   = overlap / F * sum over i of max_k w_ik (1 - GIoU(b_S,i, b_T,i))

    The gradient of ``score`` goes through w, that of ``overlap`` does not.  F, at least 1, is the number of
    foreground anchors of the batch on all levels by the student's own matching; ignored anchors and those on
    padding count nowhere.

    Evidence: the paper's two losses (binary classification and IoU-based localization distillation), and the
    authors' code (TinyTigerPan/BCKD, GFL only) for the gradients, F, the weights 1 and 4 and GIoU where the
    text says IoU.  Not followed: there a level without foreground gives zero.  OURS: the same for the boxes
    of RetinaNet and FCOS, which are no distributions.

    Maps: ``logits`` (N, A*K, H, W) and ``boxes`` (N, A*4, H, W), of which the student's has a gradient.  No
    parameters.

    Example::

        model.stages.bckd = L(Stage)(loss=L(BCKD)(score=1.0, overlap=4.0), weight=1.0)

    Args:
        score, overlap: weights of the two terms, 0 or more.
        strides: see :class:`DistillationLoss`.

    Raises:
        ConfigError: a negative weight.
    """

    needs = frozenset({"teacher", "labels"})
    same_head = ("logits", "boxes")

    def __init__(self, score: float, overlap: float, strides: Optional[List[int]] = None):
        super().__init__("logits", strides)
        check_weights(score=score, overlap=overlap)
        self.score, self.overlap = score, overlap

    @property
    def taps(self) -> FrozenSet[str]:
        return frozenset({"logits", "deltas", "boxes"})

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        first = self.strides[0]
        k = batch.student["logits"][first].shape[1] // batch.labels[first].shape[1]
        count, terms = number_of_foreground(batch, k), {}
        boxes = self.levels(batch, "boxes")
        for (stride, z_s, z_t), (_, b_s, b_t) in zip(self.levels(batch), boxes):
            counted = (batch.labels[stride] >= 0) & on_images(batch, stride)
            z_s, p_t = (x.unflatten(1, (-1, k)) for x in (z_s, z_t.detach().sigmoid()))
            gap = (p_t - z_s.sigmoid()).abs() * counted.unsqueeze(2)  # (N, A, K, H, W)
            score = gap * F.binary_cross_entropy_with_logits(z_s, p_t, reduction="none")
            overlap = gap.detach().amax(2) * (1 - giou(b_s, b_t.detach()))
            terms[f"s{stride}_score"] = self.score * score.sum() / count
            terms[f"s{stride}_overlap"] = self.overlap * overlap.sum() / count
        return terms
