"""DIST: class scores that correlate with the teacher's, over classes and over regions or anchors."""

from typing import Dict, FrozenSet, List, Optional

import torch
from torch import Tensor

from sharedkd.values import check_number

from .base import Batch, DistillationLoss, check_weights, precise
from .dense import foreground, on_images

__all__ = ["DIST", "DenseDIST"]

EPS = 1e-6  # least standard deviation of scores: rounding alone has none that is larger


def _apart(s: Tensor, t: Tensor, counted: Tensor, dim: int) -> Tensor:
    """1 - Pearson's correlation of ``s`` and ``t`` along ``dim``, of what is ``counted`` (1, else 0).

    It is 0 where ``t`` is constant.
    """
    total = counted.sum(dim, keepdim=True).clamp(min=1)
    s, t = (counted * (x - (counted * x).sum(dim, keepdim=True) / total) for x in (s, t))
    s, t = s / total.sqrt(), t / total.sqrt()
    spread = t.norm(dim=dim)
    correlation = (s * t).sum(dim) / (s.norm(dim=dim).clamp(min=EPS) * spread.clamp(min=EPS))
    return (1 - correlation) * (spread > EPS)


class DIST(DistillationLoss):
    """Compares the class scores of the sampled regions by their correlations.

    Knowledge Distillation from A Stronger Teacher (NeurIPS 2022).  With p = softmax(z / T) (R, C) of the R
    regions and their C = K + 1 classes, background among them, and rho Pearson's correlation::

        inter = beta  T^2 mean over the regions of (1 - rho(p_S[r, :], p_T[r, :]))
        intra = gamma T^2 mean over the classes of (1 - rho(p_S[:, c], p_T[:, c]))

    A stronger teacher is more certain; correlations do not ask for its scale.

    Evidence: the paper's inter-class and intra-class relations; the means, and sigmoids for heads that have
    them, in the authors' code for segmentation (hunto/DIST_KD).  T^2 is usual where the method is used for
    classification; at T = 1 it has no effect.  OURS: regions or classes of which the teacher's scores are all
    equal count as 0.

    Terms: ``inter`` and ``intra``, 0 without regions.  Reads no maps.  No parameters.

    Example::

        model.stages.dist = L(Stage)(loss=L(DIST)(beta=1.0, gamma=1.0), weight=1.0)

    Args:
        beta, gamma: weights of the two terms, 0 or more.
        temperature: T, above 0.

    Raises:
        ConfigError: a number out of its range.
    """

    needs = frozenset({"teacher", "regions"})

    def __init__(self, beta: float, gamma: float, temperature: float = 1.0):
        super().__init__()
        check_weights(beta=beta, gamma=gamma)
        check_number("temperature", temperature, above=0)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    @property
    def taps(self) -> FrozenSet[str]:
        return frozenset()

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        both = batch.regions.student, batch.regions.teacher.detach()
        s, t = ((precise(x) / self.temperature).softmax(1) for x in both)
        all_, scale = torch.ones_like(t), self.temperature**2
        return {
            "inter": self.beta * scale * _apart(s, t, all_, 1).sum() / max(len(s), 1),
            "intra": self.gamma * scale * _apart(s, t, all_, 0).mean(),
        }


class DenseDIST(DistillationLoss):
    """DIST for one-stage detectors, on the scores of their anchors.

    As :class:`DIST` with p = sigmoid(z / T) (R, K), R the anchors of all levels of the batch.  The paper
    reports RetinaNet and does not say which anchors count.  OUR reading: ``inter`` is the mean over the
    foreground anchors by the student's own matching, as the classes of background correlate by chance;
    ``intra`` runs over all anchors but ignored ones and those on padding.

    Terms: ``inter`` (0 without foreground, and of a single class) and ``intra``.  No parameters.

    Example::

        model.stages.dist = L(Stage)(loss=L(DenseDIST)(beta=1.0, gamma=1.0), weight=1.0)

    Args:
        beta, gamma, temperature: see :class:`DIST`.
        strides: see :class:`DistillationLoss`.

    Raises:
        ConfigError: a number out of its range.
    """

    needs = frozenset({"teacher", "labels"})
    same_head = ("logits",)

    def __init__(
        self,
        beta: float,
        gamma: float,
        temperature: float = 1.0,
        strides: Optional[List[int]] = None,
    ):
        super().__init__("logits", strides)
        check_weights(beta=beta, gamma=gamma)
        check_number("temperature", temperature, above=0)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        rows: List[List[Tensor]] = [[], [], [], []]
        for stride, s, t in self.levels(batch):
            k = s.shape[1] // batch.labels[stride].shape[1]
            counted = (batch.labels[stride] >= 0) & on_images(batch, stride)
            for found, x in zip(rows, (s, t.detach())):
                scores = (x / self.temperature).sigmoid()
                found.append(scores.unflatten(1, (-1, k)).movedim(2, -1).reshape(-1, k))
            rows[2].append(counted.flatten())
            rows[3].append((counted & foreground(batch, stride, k)).flatten())
        s, t, counted, chosen = (torch.cat(x) for x in rows)
        inter = _apart(s, t, torch.ones_like(t), 1) * chosen
        intra = _apart(s, t, counted.to(t.dtype).unsqueeze(1), 0)
        scale = self.temperature**2
        return {
            "inter": self.beta * scale * inter.sum() / chosen.sum().clamp(min=1),
            "intra": self.gamma * scale * intra.mean(),
        }
