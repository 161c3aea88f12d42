"""GID: distil the few boxes about which teacher and student disagree most."""

from typing import Dict, FrozenSet, List, Optional, Tuple

import torch
import torch.nn.functional as F
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from sharedkd.errors import ConfigError
from sharedkd.values import check_choice, check_number

from .base import Batch, DistillationLoss, Shapes, check_weights, precise

__all__ = ["GID"]

EPS = 1e-6  # least mean distance: instances that all look the same have no structure
OVERLAP = 1e-6  # least IoU of a best anchor: less than any in an image, more than none
PAIR = Tuple[Tensor, Tensor]  # student's, teacher's


class GID(DistillationLoss):
    """Compares features, relations and responses of instances where the two detectors disagree.

    General Instance Distillation for Object Detection (CVPR 2021).  With the dense head's logits z
    and boxes of all anchors of all levels in use, an anchor's score is
    ``|max_k sigmoid(z_T) - max_k sigmoid(z_S)|`` and its box that of the more confident detector.
    The general instances of an image: its ``candidates`` best scores, boxes clipped to the image,
    those with a side of ``min_size`` pixels or less dropped, NMS, the best ``instances``.  On an
    instance are the anchors whose IoU with it is ``match`` or more; if it has none, those of its
    highest IoU.  With t_i, s_i (C, h, w) the maps cropped at instance i, n instances in the batch and
    B anchors on one or more instances of their image::

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
    0.1 and 0.0 of ``beta`` (students trained with and without smooth L1).  Which anchors are on an
    instance is the student's own matching, RetinaNet's: 0.5, best anchors (ties too), and what it
    ignores, 0.4 to 0.5, is off.  The shared 3x3 adapter is never applied, so features are compared as
    they are.  OURS: strides of any pyramid; two-stage detectors, whose RPN is the dense head, with
    K = 1; and FCOS, whose centerness is no part of the score, and whose points have no anchors to
    match: with ``positions="boxes"`` those are on an instance for which *the box that the teacher
    predicts*, clipped to the image, has an IoU of ``match`` or more with it, and the one that the
    instance comes from.  The selection has no gradient.

    Parameters: none where the widths agree; with ``adapter`` 1 C_s * C_t + C_t a level (65,792 at 256
    channels), with 3 9 * C_s * C_t + C_t (590,080).

    Example::

        model.stages.gid = L(Stage)(
            loss=L(GID)(feature=5e-4, relation=40.0, response_class=0.1, response_box=1.0), weight=1.0
        )

    Args:
        feature, relation, response_class, response_box: the weights of the four terms, 0 or more.
        instances: at most so many per image.
        candidates: how many per image go into NMS.
        nms: the IoU above which NMS drops a box.
        min_size: sides in pixels, see above.
        crop: h = w, size of the crops.
        match: IoU, see above.
        positions: what is matched with instances: ``anchors``, the student's, or ``boxes``, the
            teacher's, see above.
        beta: see above; 0 is L1.
        adapter: kernel of a convolution on the student's maps, see
            :func:`~sharedkd.losses.adapter.adapters`.
        strides: see :class:`DistillationLoss`; each has to be twice the one before.

    Raises:
        ConfigError: an option out of its range.
    """

    same_head = ("logits", "deltas")
    adapts = True

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
        positions: str = "anchors",
        beta: float = 0.1,
        adapter: Optional[int] = None,
        strides: Optional[List[int]] = None,
    ):
        super().__init__("fpn", strides)
        for key, value in (("instances", instances), ("candidates", candidates), ("crop", crop)):
            check_number(key, value, least=1, whole=True)
        for key, overlap in (("nms", nms), ("match", match)):
            check_number(key, overlap, above=0, most=1)
        check_choice("positions", positions, ("anchors", "boxes"))
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
        self.positions = positions
        self.beta = beta
        self.adapter = adapter

    @property
    def taps(self) -> FrozenSet[str]:
        return frozenset({"fpn", "logits", "deltas", "boxes", self.positions})

    def bind(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        super().bind(student, teacher, key)
        if any(b != 2 * a for a, b in zip(self.strides, self.strides[1:])):
            raise ConfigError(
                f"{key}.strides",
                self.strides,
                "is no pyramid to crop from, each stride has to be twice the one before",
                "leave no level out in between",
            )
        for who, pyramid in (("student", student["fpn"]), ("teacher", teacher["fpn"])):
            widths = [pyramid[s] for s in self.strides]
            if len(set(widths)) > 1:
                raise ConfigError(
                    f"{key}.strides",
                    self.strides,
                    f"have levels of {', '.join(map(str, widths))} channels in the {who}: an object is "
                    "cropped from the one that suits its size",
                    "name strides of one width",
                )
        self.anchors = {s: student["deltas"][s] // 4 for s in self.strides}  # of a position
        self.pooler = ROIPooler(
            output_size=self.crop,
            scales=[1 / s for s in self.strides],
            sampling_ratio=2,
            pooler_type="ROIAlignV2",
        )

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        logits, deltas = self._rows(batch, "logits"), self._rows(batch, "deltas")
        boxes = self._boxes(batch)
        instances, there, origins = self._select(logits, boxes)
        if self.positions == "anchors":
            on = self._on_anchors(batch, instances)
        else:
            on = self._on_boxes(boxes[1], instances, there, origins)
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
        shapes = [z.shape[:4] for z, _ in logits]  # (N, A, H, W)
        levels = on.split([shape[1:].numel() for shape in shapes], 1)
        for (z_s, z_t), (d_s, d_t), level, shape in zip(logits, deltas, levels, shapes):
            # Gathered, for the anchors on an instance are a few of some hundred thousand.
            rows = level.view(shape).nonzero(as_tuple=True)
            classes = classes + F.binary_cross_entropy_with_logits(
                z_s[rows], z_t[rows].sigmoid(), reduction="sum"
            )
            deltas_apart = deltas_apart + F.smooth_l1_loss(
                d_s[rows], d_t[rows], reduction="sum", beta=self.beta
            )
        anchors = on.sum().clamp(min=1)
        return {
            "feature": self.feature * feature,
            "relation": self.relation * relation,
            "response_class": self.response_class * classes / anchors,
            "response_box": self.response_box * deltas_apart / anchors,
        }

    def _rows(self, batch: Batch, tap: str) -> List[PAIR]:
        """View both detectors' outputs per level as (N, A, H, W, channels of an anchor)."""
        return [
            tuple(
                x.unflatten(1, (self.anchors[stride], -1)).movedim(2, -1) for x in (s, t.detach())
            )
            for stride, s, t in self.levels(batch, tap)
        ]

    def _flat(self, batch: Batch, tap: str) -> PAIR:
        """Concatenate both detectors' boxes of all R anchors of all levels: (N, R, 4)."""
        return tuple(
            torch.cat([x.flatten(1, 3) for x in levels], 1)
            for levels in zip(*self._rows(batch, tap))
        )

    @torch.no_grad()
    def _boxes(self, batch: Batch) -> PAIR:
        """Clip the boxes that both detectors predict to the images: (N, R, 4)."""
        s, t = self._flat(batch, "boxes")
        sizes = torch.tensor([(w, h, w, h) for h, w in batch.image_sizes], dtype=s.dtype)
        limits = sizes.to(s.device, non_blocking=True).unsqueeze(1)  # nothing waits for a GPU
        return s.clamp(min=0).minimum(limits), t.clamp(min=0).minimum(limits)

    @torch.no_grad()
    def _select(self, logits: List[PAIR], boxes: PAIR) -> Tuple[Tensor, Tensor, Tensor]:
        """Select the general instances.

        Returns:
            (N, I, 4) boxes, zero where an image has fewer than I; (N, I) bool, which of them exist;
            and (N, I) int64, the anchors that they come from.
        """
        s, t = (torch.cat([x.amax(-1).flatten(1) for x in z], 1).sigmoid() for z in zip(*logits))
        found = boxes[1].where((t > s).unsqueeze(-1), boxes[0])

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
        return found, there, anchors.gather(1, best)

    @torch.no_grad()
    def _on_anchors(self, batch: Batch, instances: Tensor) -> Tensor:
        """Find which of the student's anchors are on an instance: (N, R) bool."""
        on = []
        for anchors, found in zip(self._flat(batch, "anchors")[0], instances):
            iou = box_iou(anchors, found)  # an image's R x I at a time are enough to hold
            # An instance that is not there overlaps no anchor.
            on.append((iou >= iou.amax(0).clamp(OVERLAP, self.match)).any(1))
        return torch.stack(on)

    @torch.no_grad()
    def _on_boxes(self, boxes: Tensor, instances: Tensor, there: Tensor, origins: Tensor) -> Tensor:
        """Find the anchors whose teacher's box (N, R, 4) is on an instance: (N, R) bool."""
        on = torch.stack([(box_iou(b, g) >= self.match).any(1) for b, g in zip(boxes, instances)])
        return on.scatter(1, origins, on.gather(1, origins) | there)

    def _crops(self, batch: Batch, instances: Tensor) -> PAIR:
        """Crop both detectors' maps at the instances: (N * I, C, h, w)."""
        maps = [
            (precise(self.adapters[str(stride)](s)), t.detach())
            for stride, s, t in self.levels(batch)
        ]
        boxes = [Boxes(x) for x in instances]
        return tuple(self.pooler(list(x), boxes) for x in zip(*maps))

    @staticmethod
    def _structure(crops: Tensor, pairs: Tensor) -> Tensor:
        """Distances (n, n) of crops (n, C, h, w), divided by their mean over ``pairs`` (n, n)."""
        flat = crops.flatten(1)
        # Centred, which leaves distances alone: the product below keeps more of their digits.
        flat = flat - flat.mean(0)
        distances = torch.cdist(flat, flat, compute_mode="use_mm_for_euclid_dist") * pairs
        return distances / (distances.sum() / pairs.sum().clamp(min=1)).clamp(min=EPS)
