"""CrossKD: what the student's head has, finished by the teacher's head, should give the teacher's predictions."""

from typing import Dict, FrozenSet, List, Optional

import torch.nn.functional as F
from torch import Tensor

from sharedkd.errors import ConfigError
from sharedkd.values import check_number

from .base import Batch, DistillationLoss, Shapes, check_weights, precise
from .dense import foreground, giou, number_of_foreground, on_images

__all__ = ["CrossKD", "RegionCrossKD"]


class CrossKD(DistillationLoss):
    """Compares what the teacher's head makes of the student's maps with what it makes of its own.

    CrossKD: Cross-Head Knowledge Distillation for Object Detection (CVPR 2024), from the paper alone.  The
    maps of the student's head before its last ``left`` convolutions go through the teacher's last ``left``
    and its prediction, which are frozen: z_C, b_C are these logits and boxes, z_T, b_T the teacher's own.
    Over the anchors i and classes k of a level, with p = sigmoid(z)::

        s8_score   = score   / F * sum over i and k of |p_T,ik - p_C,ik|^2 BCE(z_C,ik, p_T,ik)
        s8_overlap = overlap / F * sum over foreground i of (1 - GIoU(b_C,i, b_T,i))

    So the student's own predictions are not pulled from the ground truth towards the teacher.  The paper has
    the quality focal loss on all positions, GIoU on the foreground for heads without distributions, four
    convolutions a tower, and the cut after the third (``left=1``).  OUR reading: the foreground is that of
    the student's own matching, F, at least 1, its anchors on all levels of the batch, and padding counts
    nowhere; FCOS's centerness has no part.  Two-stage heads have no such towers, see :class:`RegionCrossKD`.

    Maps: the teacher's ``logits`` (N, A*K, H, W) and ``boxes`` (N, A*4, H, W).  No parameters.

    Example::

        model.stages.crosskd = L(Stage)(loss=L(CrossKD)(score=1.0, overlap=1.0), weight=1.0)

    Args:
        score, overlap: weights of the two terms, 0 or more.
        left: of the head's convolutions before the prediction; 0: the prediction alone.
        strides: see :class:`DistillationLoss`.

    Raises:
        ConfigError: a number out of its range.
    """

    needs = frozenset({"teacher", "labels", "crossed"})
    guides = frozenset({"logits", "boxes"})
    same_head = ("logits", "boxes")

    def __init__(
        self, score: float, overlap: float, left: int = 1, strides: Optional[List[int]] = None
    ):
        super().__init__("fpn", strides)
        check_weights(score=score, overlap=overlap)
        check_number("left", left, least=0, whole=True)
        self.score, self.overlap, self.left = score, overlap, left

    @property
    def taps(self) -> FrozenSet[str]:
        return frozenset({"fpn", "logits", "boxes"})

    def bind(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        super().bind(student, teacher, key)
        ours, theirs = (sorted(x["logits"]) for x in (student, teacher))
        if ours != theirs:
            problem = f"the student's head has levels {ours}, the teacher's {theirs}"
            fix = "use a teacher with the student's levels"
            raise ConfigError(key, type(self).__name__, problem, fix)

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        crossed, terms, first = batch.crossed(self.left), {}, self.strides[0]
        k = crossed["logits"][first].shape[1] // batch.labels[first].shape[1]
        count = number_of_foreground(batch, k)
        for stride in self.strides:
            z_c, b_c = (precise(crossed[tap][stride]) for tap in ("logits", "boxes"))
            p_t = precise(batch.teacher["logits"][stride]).detach().sigmoid()
            b_t = precise(batch.teacher["boxes"][stride]).detach()
            inside = on_images(batch, stride)
            score = (p_t - z_c.sigmoid()).square()
            score = score * F.binary_cross_entropy_with_logits(z_c, p_t, reduction="none")
            score = score.unflatten(1, (-1, k)) * inside.unsqueeze(2)
            chosen = foreground(batch, stride, k) & inside
            overlap = (1 - giou(b_c, b_t)) * chosen
            terms[f"s{stride}_score"] = self.score * score.sum() / count
            terms[f"s{stride}_overlap"] = self.overlap * overlap.sum() / count
        return terms


class RegionCrossKD(DistillationLoss):
    """CrossKD for two-stage detectors, on the regions that the student samples.  OUR adaptation.

    The paper has dense heads only.  Here the student's features of a region before the last ``left`` layers
    of its box head go through the teacher's last ``left`` and its predictor, which are frozen: z_C (R, K + 1)
    and d_C are these class logits and box deltas of the R regions, z_T, d_T those that the teacher's head
    makes of its own maps there.  With p = softmax(z) and y a region's class by the student's own matching::

        score = score / R * sum over the regions of KL(p_T || p_C)
        box   = box / R * sum over the regions of objects of |d_C,y - d_T,y|_1

    Both are what the detector's own losses become with the teacher's predictions as targets: cross entropy
    up to a constant, and the L1 distance of the deltas of one class over the number of all regions.  A
    region of background has no box.

    Terms: ``score`` and ``box``, 0 without regions.  Reads no maps.  No parameters.

    Example::

        model.stages.crosskd = L(Stage)(loss=L(RegionCrossKD)(score=1.0, box=1.0), weight=1.0)

    Args:
        score, box: weights of the two terms, 0 or more.
        left: of the box head's convolutions and linear layers before the predictor; 0: the predictor alone;
            all of them: the teacher's whole head, on the student's pooled regions.

    Raises:
        ConfigError: a number out of its range.
    """

    needs = frozenset({"teacher", "regions", "crossed"})

    def __init__(self, score: float, box: float, left: int = 1):
        super().__init__()
        check_weights(score=score, box=box)
        check_number("left", left, least=0, whole=True)
        self.score, self.box, self.left = score, box, left

    @property
    def taps(self) -> FrozenSet[str]:
        return frozenset()

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        regions = batch.regions
        z_c, d_c = map(precise, regions.crossed(self.left))
        z_t, d_t = (precise(x).detach() for x in (regions.teacher, regions.deltas))
        k, count = z_t.shape[1] - 1, max(len(z_t), 1)
        score = F.kl_div(z_c.log_softmax(1), z_t.log_softmax(1), reduction="sum", log_target=True)
        apart = (d_c - d_t).abs().unflatten(1, (-1, 4)).sum(2)  # (R, K), or (R, 1) for all classes
        mine = regions.labels.clamp(max=apart.shape[1] - 1).unsqueeze(1)
        box = apart.gather(1, mine).squeeze(1) * (regions.labels < k)
        return {
            "score": self.score / count * score,
            "box": self.box / count * box.sum(),
        }
