"""GID: distil the few boxes about which teacher and student disagree most."""

from typing import Dict, FrozenSet, List, Optional, Tuple

import torch
import torch.nn.functional as F
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from ..errors import ConfigError
from .adapter import adapters
from .base import Batch, DistillationLoss, Shapes, check_weights, precise
from .dense import check_same_head

__all__ = ["GID"]

EPS = 1e-6  # least mean distance: instances that all look the same have no structure
PAIR = Tuple[Tensor, Tensor]  # student's, teacher's


class GID(DistillationLoss):
    """Features, relations and responses of the instances where the two detectors disagree.

    General Instance Distillation for Object Detection (CVPR 2021).  With the dense head's logits z
    and boxes of all anchors of all levels in use, an anchor's score is
    ``|max_k sigmoid(z_T) - max_k sigmoid(z_S)|`` and its box that of the more confident detector.
    The general instances of an image: its ``candidates`` best scores, boxes clipped to the image,
    those with a side of ``min_size`` pixels or less dropped, NMS, the best ``instances``.  With t_i,
    s_i (C, h, w) the maps cropped at instance i, n instances in the batch and B anchors on them::

        feature        = w / (n h w) * sum_i ||t_i - s_i||^2
        relation       = w / (n^2 - n) * sum_{i != j} smoothL1( d_ij(s) / mean d(s)
                                                              - d_ij(t) / mean d(t) )
        response_class = w / B * sum over these anchors and the K classes of BCE(z_S, sigmoid(z_T))
        response_box   = w / B * sum over these anchors and 4 deltas of smoothL1(S - T)

    each with its own weight w; d_ij is the L2 distance of two crops, the mean is over i != j, and
    smoothL1 has beta 1 in relation, ``beta`` in response_box.  Fewer than three instances have no
    relation (0); without an instance all terms are 0.  n, the pairs and B are those of the whole
    batch, so an image's terms depend on its batch, as published.

    Evidence: read in the authors' code for Detectron2 (daixinghome/Distill_GID_detectron2, RetinaNet
    only, by its own account not aligned in accuracy) and its configs: the selection with its
    constants, sums and divisors, ROIAlignV2 of 10x10 with 2x2 samples where an instance is cropped
    from the one level that its size selects (Detectron2's ROIPooler: 224 pixels at stride 16), the
    0.1 and 0.0 of ``beta`` (students trained with and without smooth L1).  Its shared 3x3 adapter is
    never applied, so features are compared as they are.  OURS: anchors are on an instance where the
    *box that the teacher predicts* for them has an IoU of ``match`` or more with it, or where the
    instance comes from (there: the anchor itself at 0.5, and the best anchor of each instance);
    strides of any pyramid; FCOS, whose centerness is no part of the score; and two-stage detectors,
    whose RPN is the dense head, with K = 1.  The selection has no gradient.

    Parameters: none where the widths agree; with ``adapter`` 1 C_s * C_t + C_t a level (65,792 at 256
    channels), with 3 9 * C_s * C_t + C_t (590,080).

    Example::

        model.stages.gid = L(Stage)(
            loss=L(GID)(feature=5e-4, relation=40.0, response_class=0.1, response_box=1.0), weight=1.0
        )

    Args:
        feature, relation, response_class, response_box: the weights of the four terms, 0 or more.
        instances: how many of an image are kept.
        candidates: how many of an image go into NMS.
        nms: the IoU above which NMS drops a box.
        min_size: sides in pixels, see above.
        crop: h = w, size of the crops.
        match: IoU, see above.
        beta: see above; 0 is L1.
        adapter: kernel of a convolution on the student's maps, see
            :func:`~sharedkd.losses.adapter.adapters`.
        strides: see :class:`DistillationLoss`; each has to be twice the one before.
    """

    def __init__(
        self,
        feature: float,
        relation: float,
        response_class: float,
        response_box: float,
        instances: int = 10,
        candidates: int = 3000,
        nms: float = 0.3,
        min_size: float = 10.0,
        crop: int = 10,
        match: float = 0.5,
        beta: float = 0.1,
        adapter: Optional[int] = None,
        strides: Optional[List[int]] = None,
    ):
        super().__init__("fpn", strides)
        for key, value in (("instances", instances), ("candidates", candidates), ("crop", crop)):
            if value < 1:
                raise ConfigError(key, value, "is less than one", "use 1 or more")
        for key, value in (("nms", nms), ("match", match)):
            if not 0 < value <= 1:
                raise ConfigError(key, value, "is no IoU", "use a number above 0, 1 at most")
        check_weights(
            feature=feature,
            relation=relation,
            response_class=response_class,
            response_box=response_box,
        )
        check_weights(min_size=min_size, beta=beta)
        self.feature = feature
        self.relation = relation
        self.response_class = response_class
        self.response_box = response_box
        self.instances = instances
        self.candidates = candidates
        self.nms = nms
        self.min_size = min_size
        self.crop = crop
        self.match = match
        self.beta = beta
        self.adapter = adapter

    @property
    def taps(self) -> FrozenSet[str]:
        return frozenset({"fpn", "logits", "deltas", "boxes"})

    def bind(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        super().bind(student, teacher, key)
        if any(b != 2 * a for a, b in zip(self.strides, self.strides[1:])):
            raise ConfigError(
                f"{key}.strides",
                self.strides,
                "is no pyramid to crop from, each stride has to be twice the one before",
                "leave no level out in between",
            )
        for tap in ("logits", "deltas"):
            check_same_head(student, teacher, tap, self.strides, key, type(self).__name__)
        self.anchors = {s: student["deltas"][s] // 4 for s in self.strides}  # of a position
        self.adapters = adapters(
            self.adapter, student["fpn"], teacher["fpn"], self.strides, f"{key}.adapter"
        )
        self.pooler = ROIPooler(
            output_size=self.crop,
            scales=[1 / s for s in self.strides],
            sampling_ratio=2,
            pooler_type="ROIAlignV2",
        )

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        logits, deltas, boxes = (self._rows(batch, tap) for tap in ("logits", "deltas", "boxes"))
        instances, there, matched = self._select(logits, boxes, batch.image_sizes)
        there = there.flatten().to(instances.dtype)
        count = there.sum()

        s, t = self._crops(batch, instances)
        apart = (s - t).square().sum(1).mean((1, 2))
        feature = (apart * there).sum() / count.clamp(min=1)

        pairs = (there[:, None] * there).fill_diagonal_(0)
        apart = F.smooth_l1_loss(
            self._structure(s, pairs), self._structure(t, pairs), reduction="sum"
        )
        relation = apart / pairs.sum().clamp(min=1) * (count >= 3)

        classes = deltas_apart = 0
        for (z_s, z_t), (d_s, d_t), on in zip(logits, deltas, matched):
            # Gathered, for the anchors on an instance are a few of some hundred thousand.
            rows = on.nonzero(as_tuple=True)
            classes = classes + F.binary_cross_entropy_with_logits(
                z_s[rows], z_t[rows].sigmoid(), reduction="sum"
            )
            deltas_apart = deltas_apart + F.smooth_l1_loss(
                d_s[rows], d_t[rows], reduction="sum", beta=self.beta
            )
        anchors = sum(on.sum() for on in matched).clamp(min=1)
        return {
            "feature": self.feature * feature,
            "relation": self.relation * relation,
            "response_class": self.response_class * classes / anchors,
            "response_box": self.response_box * deltas_apart / anchors,
        }

    def _rows(self, batch: Batch, tap: str) -> List[PAIR]:
        """Per level both detectors' outputs as views (N, A, H, W, channels of an anchor)."""
        return [
            tuple(
                x.unflatten(1, (self.anchors[stride], -1)).movedim(2, -1) for x in (s, t.detach())
            )
            for stride, s, t in self.levels(batch, tap)
        ]

    @torch.no_grad()
    def _select(
        self, logits: List[PAIR], boxes: List[PAIR], sizes: List[Tuple[int, int]]
    ) -> Tuple[Tensor, Tensor, List[Tensor]]:
        """The general instances.

        Returns:
            (N, I, 4) boxes; (N, I) bool, which of them there are (others are zero); and per level
            (N, A, H, W) bool, the anchors on an instance.
        """
        limits = boxes[0][0].new_tensor([(w, h, w, h) for h, w in sizes]).unsqueeze(1)
        s, t = (torch.cat([x.amax(-1).flatten(1) for x in z], 1).sigmoid() for z in zip(*logits))
        boxes_s, boxes_t = (
            torch.cat([x.flatten(1, 3) for x in b], 1).clamp(min=0).minimum(limits)
            for b in zip(*boxes)
        )
        found = boxes_t.where((t > s).unsqueeze(-1), boxes_s)

        scores, anchors = (t - s).abs().topk(min(self.candidates, s.shape[1]))
        found = found.gather(1, anchors.unsqueeze(-1).expand(-1, -1, 4))
        keep = (found[..., 2:] - found[..., :2] > self.min_size).all(-1)
        # Zero, what is dropped suppresses no other.
        found = found.where(keep.unsqueeze(-1), torch.zeros_like(found))
        images = torch.arange(len(found), device=found.device).repeat_interleave(found.shape[1])
        survivors = batched_nms(found.flatten(0, 1), scores.flatten(), images, self.nms)
        keep &= torch.zeros_like(keep).flatten().index_fill(0, survivors, True).view_as(keep)
        scores, best = scores.masked_fill(~keep, -1).topk(min(self.instances, scores.shape[1]))
        there = scores >= 0
        found = found.gather(1, best.unsqueeze(-1).expand(-1, -1, 4)) * there.unsqueeze(-1)

        matched = [box_iou(b, g).amax(1) for b, g in zip(boxes_t, found)]
        matched = torch.stack(matched) >= self.match
        origin = anchors.gather(1, best)
        matched.scatter_(1, origin, matched.gather(1, origin) | there)
        shapes = [z.shape[:4] for z, _ in logits]
        levels = matched.split([shape[1:].numel() for shape in shapes], 1)
        return found, there, [x.view(shape) for x, shape in zip(levels, shapes)]

    def _crops(self, batch: Batch, instances: Tensor) -> PAIR:
        """Both detectors' maps at the instances: (N * I, C, h, w)."""
        maps = [
            (precise(self.adapters[str(stride)](s)), t.detach())
            for stride, s, t in self.levels(batch)
        ]
        boxes = [Boxes(x) for x in instances]
        return tuple(self.pooler(list(x), boxes) for x in zip(*maps))

    @staticmethod
    def _structure(crops: Tensor, pairs: Tensor) -> Tensor:
        """Distances (n, n) of crops (n, C, h, w), in units of their mean over ``pairs`` (n, n)."""
        flat = crops.flatten(1)
        # Centred, which leaves distances alone: the product below keeps more of their digits.
        flat = flat - flat.mean(0)
        distances = torch.cdist(flat, flat, compute_mode="use_mm_for_euclid_dist") * pairs
        return distances / (distances.sum() / pairs.sum().clamp(min=1)).clamp(min=EPS)
