"""DKD: decoupled knowledge distillation of the class logits, for softmax and for sigmoid heads."""

from typing import Dict, FrozenSet, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sharedkd.errors import ConfigError
from sharedkd.values import check_number

from .base import Batch, DistillationLoss, check_weights, precise
from .dense import number_of_foreground

__all__ = ["DKD", "DenseDKD", "bernoulli_kl", "decoupled_kl"]


def bernoulli_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(Bern(sigmoid(``teacher``)) || Bern(sigmoid(``student``))), element by element.

    Takes logits of one shape: it is finite for all finite logits, and exactly 0 where both are
    equal.  The teacher's logits get no gradient.
    """
    teacher = teacher.detach()
    p = teacher.sigmoid()
    # cross entropy minus the teacher's entropy
    return F.binary_cross_entropy_with_logits(
        student, p, reduction="none"
    ) - F.binary_cross_entropy_with_logits(teacher, p, reduction="none")


def decoupled_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tuple[Tensor, Tensor]:
    """Split KL(softmax(teacher) || softmax(student)) into its two terms, row by row.

    ``softmax(z)_t = sigmoid(z_t - logsumexp_{j != t} z_j)``: the target class against all others is
    a Bernoulli variable with that logit.  KL = TCKD + (1 - p_t^T) NCKD.

    Args:
        student, teacher: (R, C) logits, at least two classes.
        labels: (R,) int64, the target class t of each row.

    Returns:
        TCKD (R,), NCKD (R,).
    """
    index = labels.unsqueeze(1)
    target = torch.zeros_like(student, dtype=torch.bool).scatter(1, index, True)

    def split(z: Tensor) -> Tuple[Tensor, Tensor]:
        others = z.masked_fill(target, float("-inf"))
        log_q = others.log_softmax(1).masked_fill(target, 0.0)  # no 0 * inf below
        return z.gather(1, index) - others.logsumexp(1, keepdim=True), log_q

    s, log_s = split(student)
    t, log_t = split(teacher.detach())
    # At t the two logs are equal, so that it adds nothing.
    return bernoulli_kl(s, t).squeeze(1), (log_t.exp() * (log_t - log_s)).sum(1)


class DKD(DistillationLoss):
    """Compares the class logits of the sampled regions, split into target and other classes.

    Decoupled Knowledge Distillation (CVPR 2022), with z' = z / T, p = softmax(z'), t a region's
    label (background is a class like any other) and q_j = p_j / (1 - p_t) for j != t::

        TCKD = KL([p_t^T, 1 - p_t^T] || [p_t^S, 1 - p_t^S])
        NCKD = KL(q^T || q^S)
        L    = mean over the R regions of (alpha * TCKD + beta * NCKD) * T^2

    Evidence: read in the authors' public code (mdistiller: classification and R-CNN), which masks
    the target by subtracting 1000 from its logit; here it is left out exactly and everything stays
    in logs.  The published detection setting is alpha 1, beta 0.25, T 1, no warm-up.

    Terms: ``target`` and ``nontarget``, with alpha, beta and T^2 in them; both are 0 without
    regions.  Reads no maps.  No parameters.

    Example::

        model.stages.dkd = L(Stage)(loss=L(DKD)(alpha=1.0, beta=0.25), weight=1.0)

    Args:
        alpha, beta: weights of the two terms, 0 or more.
        temperature: T, above 0.

    Raises:
        ConfigError: a number out of its range.
    """

    needs = frozenset({"teacher", "regions"})

    def __init__(self, alpha: float, beta: float, temperature: float = 1.0):
        super().__init__()
        check_weights(alpha=alpha, beta=beta)
        check_number("temperature", temperature, above=0)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature

    @property
    def taps(self) -> FrozenSet[str]:
        return frozenset()

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        regions = batch.regions
        target, nontarget = decoupled_kl(
            precise(regions.student) / self.temperature,
            precise(regions.teacher) / self.temperature,
            regions.labels,
        )
        scale = self.temperature**2 / max(len(regions.labels), 1)  # no regions: a sum of nothing
        return {
            "target": self.alpha * scale * target.sum(),
            "nontarget": self.beta * scale * nontarget.sum(),
        }


class DenseDKD(DistillationLoss):
    """DKD for one-stage detectors, whose heads are sigmoids.  OUR adaptation.

    The paper (Decoupled Knowledge Distillation, CVPR 2022) and its code know softmax heads only.
    A sigmoid head makes each class k of an anchor a Bernoulli variable of its own, so the split is
    one over classes.  With KL_k = KL(Bern(p_k^T) || Bern(p_k^S)) and t the anchor's label by the
    student's own matching::

        target_l    = alpha / F * sum over foreground anchors of KL_t
        nontarget_l = beta / F * (sum over foreground anchors of sum_{k != t} KL_k
                                  + sum over background anchors of sum_k |p_k^T - p_k^S|^gamma KL_k)

    over the anchors of level l, those on padding included (they are background to the detector's
    own loss too); ignored anchors (-1) count nowhere.  F, the number of foreground anchors of the
    batch on all levels and at least 1, is what focal loss divides by.

    There are thousands of background anchors for each foreground one, and teacher and student agree
    on nearly all.  The factor ``|p^T - p^S|^gamma``, as in quality focal loss (NeurIPS 2020), leaves
    those where they disagree; gradients go through it.  Without it (gamma = 0) the background
    outweighs the rest: a batch with few objects has values in the hundreds.

    Terms: ``s8_target`` and ``s8_nontarget``.  No parameters.

    Example::

        model.stages.dkd = L(Stage)(loss=L(DenseDKD)(alpha=1.0, beta=0.25), weight=1.0)

    Args:
        alpha, beta: weights of the two terms, 0 or more.
        gamma: 0, or 1 or more (in between, its gradient is infinite where p^T = p^S).
        strides: see :class:`DistillationLoss`.

    Raises:
        ConfigError: a number out of its range.
    """

    needs = frozenset({"teacher", "labels"})
    same_head = ("logits",)

    def __init__(
        self, alpha: float, beta: float, gamma: float = 2.0, strides: Optional[List[int]] = None
    ):
        super().__init__("logits", strides)
        check_weights(alpha=alpha, beta=beta)
        if not (gamma == 0 or gamma >= 1):
            raise ConfigError("gamma", gamma, "is neither 0 nor 1 or more", "use 0, 1 or 2")
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        first = self.strides[0]
        k = batch.student[self.tap][first].shape[1] // batch.labels[first].shape[1]
        foreground = number_of_foreground(batch, k)
        terms = {}
        for stride, s, t in self.levels(batch):
            labels = batch.labels[stride].unsqueeze(2)  # (N, A, 1, H, W)
            s, t = s.unflatten(1, (-1, k)), t.detach().unflatten(1, (-1, k))  # (N, A, K, H, W)
            target = labels == torch.arange(k, device=s.device).view(-1, 1, 1)
            each = bernoulli_kl(s, t)
            nontarget = each.masked_fill(target | (labels < 0), 0.0)
            if self.gamma:
                focus = (t.sigmoid() - s.sigmoid()).abs() ** self.gamma
                nontarget = nontarget * focus.masked_fill(labels < k, 1.0)
            target = each.masked_fill(~target, 0.0)
            terms[f"s{stride}_target"] = self.alpha * target.sum() / foreground
            terms[f"s{stride}_nontarget"] = self.beta * nontarget.sum() / foreground
        return terms
