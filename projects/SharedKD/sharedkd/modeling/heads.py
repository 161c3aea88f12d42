"""A detector's heads: dense predictions and those of regions, what is before them, labels of anchors."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.modeling.roi_heads.rotated_fast_rcnn import RROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from sharedkd.errors import ConfigError
from sharedkd.losses.base import Maps

__all__ = [
    "DenseHead",
    "anchor_labels",
    "check_crossed",
    "check_labels",
    "check_regions",
    "finish_head",
    "finish_regions",
    "HeadTap",
    "RegionTap",
    "region_predictions",
]


@dataclass(frozen=True)
class DenseHead:
    """The part of a detector that predicts at every position: a one-stage head, or the RPN.

    Args:
        module: called with a list of maps, returns a tuple that begins with lists of logits
            (N, A*K, H, W) and deltas (N, A*4, H, W), one per level.
        names: the backbone's outputs that it reads, in order.
        strides: the strides of these outputs.
        channels: of ``logits``, ``deltas``, ``boxes`` and ``anchors``; rotated boxes have only the first two.
        owner: the module with ``anchor_generator`` and ``box2box_transform``.
    """

    module: nn.Module
    names: Sequence[str]
    strides: Sequence[int]
    channels: Dict[str, int]
    owner: nn.Module

    @classmethod
    def of(cls, detector: nn.Module) -> Optional["DenseHead"]:
        """The dense head of a RetinaNet, FCOS or two-stage ``detector``; or None.

        None for any other detector, or if the backbone lacks a level that the head reads.
        """
        rpn = getattr(detector, "proposal_generator", None)
        for owner, module, names, logits, deltas in (
            (detector, "head", "head_in_features", "cls_score", "bbox_pred"),
            (rpn, "rpn_head", "in_features", "objectness_logits", "anchor_deltas"),
        ):
            head = getattr(owner, module, None)
            if hasattr(head, logits) and hasattr(owner, "anchor_generator"):
                output_shape = getattr(getattr(detector, "backbone", None), "output_shape", dict)
                specs, levels = output_shape(), list(getattr(owner, names))
                if not set(levels) <= set(specs):  # the backbone was replaced, the head was not
                    return None
                width = {"logits": getattr(head, logits), "deltas": getattr(head, deltas)}
                width = {tap: layer.out_channels for tap, layer in width.items()}
                # A rotated box has five numbers.
                if getattr(owner.anchor_generator, "box_dim", 4) == 4:
                    width["boxes"] = width["anchors"] = width["deltas"]
                return cls(head, levels, [specs[name].stride for name in levels], width, owner)
        return None

    def run(self, features: Dict[str, Tensor]) -> Tuple[List[Tensor], ...]:
        """Run ``module`` on ``features``, the backbone's outputs: name -> (N, C, H, W)."""
        return self.module([features[name] for name in self.names])

    def unpack(self, output: Tuple[List[Tensor], ...]) -> Maps:
        """The module's ``output`` as maps by tap and stride: ``logits`` and ``deltas``."""
        return {tap: dict(zip(self.strides, levels)) for tap, levels in zip(_OUTPUTS, output)}

    def anchors(self, deltas: Dict[int, Tensor]) -> Dict[int, Tensor]:
        """The anchors of ``deltas`` in the same layout: stride -> (N, A*4, H, W), XYXY in pixels.

        One copy for all images.  An anchor of FCOS is a square of its stride about its point.
        """
        maps = [deltas[stride] for stride in self.strides]
        anchors = {}
        for stride, x, level in zip(self.strides, maps, self.owner.anchor_generator(maps)):
            channels, h, w = x.shape[1:]
            # Detectron2 lists anchors as (H*W*A, 4).
            anchors[stride] = level.tensor.view(h, w, channels).permute(2, 0, 1).expand_as(x)
        return anchors

    def boxes(self, deltas: Dict[int, Tensor]) -> Dict[int, Tensor]:
        """``deltas`` applied to their anchors, in the same layout: (N, A*4, H, W), XYXY in pixels."""
        boxes = {}
        for stride, anchors in self.anchors(deltas).items():
            # (N, A*4, H, W) -> (N, A, H, W, 4)
            x, anchors = (
                y.unflatten(1, (-1, 4)).movedim(2, -1) for y in (deltas[stride].float(), anchors)
            )
            found = self.owner.box2box_transform.apply_deltas(
                x.reshape(-1, 4), anchors.reshape(-1, 4)
            )
            boxes[stride] = found.view(x.shape).movedim(-1, 2).flatten(1, 2)
        return boxes


_OUTPUTS = ("logits", "deltas")


def check_labels(student: nn.Module, key: str) -> None:
    """Check a student for a loss that needs ``labels``.

    Args:
        student: the detector.
        key: the loss's place in the config, for messages.

    Raises:
        ConfigError: the detector does not label its anchors by class.
    """
    if not hasattr(student, "label_anchors"):
        raise ConfigError(
            key,
            type(student).__name__,
            "assigns no classes to its anchors",
            "use this loss with RetinaNet or FCOS, and its two-stage form elsewhere",
        )


@torch.no_grad()
def anchor_labels(
    detector: nn.Module, inputs: List[Dict[str, Any]], logits: Dict[int, Tensor]
) -> Dict[int, Tensor]:
    """The class of each anchor by a one-stage detector's own matching.

    Args:
        detector: RetinaNet, FCOS or another with ``label_anchors``.
        inputs: Detectron2's records.
        logits: stride -> (N, A*K, H, W), the detector's.

    Returns:
        stride -> (N, A, H, W) int64; K is background, -1 ignored.
    """
    head = DenseHead.of(detector)
    maps = [logits[stride] for stride in head.strides]
    truth = [x["instances"].to(maps[0].device) for x in inputs]
    anchors = detector.anchor_generator(maps)
    rows = torch.stack(detector.label_anchors(anchors, truth)[0])
    levels = rows.split([len(level) for level in anchors], dim=1)
    return {
        stride: level.view(len(inputs), *x.shape[-2:], -1).permute(0, 3, 1, 2)
        for stride, x, level in zip(head.strides, maps, levels)
    }


#: The output of a one-stage head -> its convolutions, and the last one, that predicts.
_TOWERS = {"logits": ("cls_subnet", "cls_score"), "deltas": ("bbox_subnet", "bbox_pred")}

REGIONS = "regions"  #: the box head of a two-stage detector; of a cascade, the first stage's

#: (output or :data:`REGIONS`, layers left) -> map of each level, or the features of all regions alone
Hidden = Dict[Tuple[str, int], List[Tensor]]
#: number of layers left before the prediction -> these and the prediction
Rest = Dict[int, List[nn.Module]]


def _rests(detector: Optional[nn.Module]) -> Dict[str, Rest]:
    """What the head of a detector still runs after each cut, see :data:`Hidden`; empty for other heads."""
    heads = getattr(detector, "roi_heads", None)
    if hasattr(heads, "box_pooler"):
        head = _first(heads.box_head)
        layers = head if isinstance(head, nn.Sequential) else ()  # any other is not cut
        return {REGIONS: _cut([*layers, _first(heads.box_predictor)])}
    head = getattr(DenseHead.of(detector), "module", None)
    if not all(hasattr(head, tower) for tower, _ in _TOWERS.values()):
        return {}
    towers = {tap: [*getattr(head, tower), getattr(head, x)] for tap, (tower, x) in _TOWERS.items()}
    return {tap: _cut(layers) for tap, layers in towers.items()}


def _cut(layers: List[nn.Module]) -> Rest:
    """Cut before each convolution or linear layer, and before the prediction, which is the last."""
    last = len(layers) - 1
    starts = [i for i in range(last) if isinstance(layers[i], (nn.Conv2d, nn.Linear))]
    return {left: layers[start:] for left, start in enumerate(reversed([*starts, last]))}


def _reads(detector: nn.Module, rest: Rest, left: int) -> str:
    """What the rest of a head reads, in words."""
    first = getattr(rest[left][0], "cls_score", rest[left][0])  # of a predictor of regions
    width = getattr(first, "in_channels", getattr(first, "in_features", "unknown"))
    before = rest[max(rest)][: -len(rest[left])]
    pooler = getattr(getattr(detector, "roi_heads", None), "box_pooler", None)
    if pooler is None or any(isinstance(x, nn.Linear) for x in before):
        return f"{width} channels"
    return f"{width} channels (regions of {'x'.join(map(str, pooler.output_size))})"


def check_crossed(student: nn.Module, teacher: Optional[nn.Module], left: int, key: str) -> None:
    """Check two detectors for a loss that needs ``crossed``.

    Args:
        student, teacher: the detectors.
        left: how many layers of the teacher's head run on the student's maps, before the prediction.
        key: the loss's place in the config, for messages.

    Raises:
        ConfigError: one has no head of so many layers, one-stage with two towers or two-stage as the
            other's; or their widths differ.
    """
    rests = []
    for who, detector in (("student", student), ("teacher", teacher)):
        rests.append(_rests(detector))
        if not rests[-1] or rests[-1].keys() != rests[0].keys():
            name, problem = type(detector).__name__, f"is a {who} without a head of two towers"
            fix = "use this loss between RetinaNets or FCOSs"
            raise ConfigError(key, name, problem, fix)
        most = min(map(len, rests[-1].values())) - 1
        if left > most:
            problem, fix = f"is more layers than the {who}'s {most}", f"use {most} at most"
            raise ConfigError(f"{key}.left", left, problem, fix)
    for tap in rests[0]:
        ours, theirs = (_reads(x, y[tap], left) for x, y in zip((student, teacher), rests))
        if ours != theirs:
            raise ConfigError(
                f"{key}.left",
                left,
                f"leaves maps of {ours} in the student's head, and the teacher's goes on with {theirs}",
                "use heads of one width",
            )


class HeadTap:
    """Takes what each layer of a detector's head reads, from its own forward."""

    def __init__(self, detector: nn.Module):
        self._rests = _rests(detector)

    @contextmanager
    def capture(self) -> Iterator[Hidden]:
        """A context to run the detector's forward in; after it, the yielded dict is filled."""
        found: Hidden = {}

        def take(key: Tuple[str, int], module: nn.Module, args: Tuple[Tensor, ...]) -> None:
            found.setdefault(key, []).append(args[0])

        with ExitStack() as hooks:
            for tap, rest in self._rests.items():
                for left, layers in rest.items():
                    hook = partial(take, (tap, left))
                    hooks.enter_context(layers[0].register_forward_pre_hook(hook))
            yield found


def finish_head(detector: nn.Module, hidden: Hidden, left: int) -> Maps:
    """Run the rest of a one-stage detector's head on what another's has before it.

    Args:
        detector: see :func:`check_crossed`.
        hidden: of :class:`HeadTap`, of a detector with the same levels.
        left: how many convolutions of each tower are left.

    Returns:
        ``logits`` and ``boxes``, attached to the graph of ``hidden``.
    """
    head, found = DenseHead.of(detector), {}
    for tap, rest in _rests(detector).items():
        # Level by level in their order: a norm may have statistics of its own for each.
        found[tap] = dict(zip(head.strides, (_through(rest[left], x) for x in hidden[tap, left])))
    return {"logits": found["logits"], "boxes": head.boxes(found["deltas"])}


def finish_regions(detector: nn.Module, hidden: Hidden, left: int) -> Tuple[Tensor, Tensor]:
    """Run the rest of a two-stage detector's box head on what another's has before it.

    Args:
        detector, hidden: see :func:`finish_head`.
        left: how many layers of the box head are left.

    Returns:
        see :func:`region_predictions`; attached to the graph of ``hidden``.
    """
    (features,) = hidden[REGIONS, left]
    return _through(_rests(detector)[REGIONS][left], features)


def _through(layers: Sequence[nn.Module], x: Any) -> Any:
    for layer in layers:
        x = layer(x)
    return x


def _first(module: nn.Module) -> nn.Module:
    """The first stage of a cascade, the only one that is trained on the RPN's own proposals."""
    return module[0] if isinstance(module, nn.ModuleList) else module


def check_regions(student: nn.Module, teacher: Optional[nn.Module], source: str, key: str) -> None:
    """Check two detectors for a loss that needs ``regions``.

    Args:
        student, teacher: the detectors; teacher None: the source of maps has none.
        source, key: the class of that source and the loss's place in the config, for messages.

    Raises:
        ConfigError: one has no box head on its FPN, or rotated boxes; or their numbers of classes differ.
    """
    if teacher is None:
        raise ConfigError(
            key,
            source,
            "is a teacher without a detector, and this loss reads what its box head predicts",
            "use a two-stage detector as teacher, or a loss that compares feature maps",
        )
    for who, detector in (("student", student), ("teacher", teacher)):
        heads = getattr(detector, "roi_heads", None)
        if isinstance(heads, RROIHeads):
            raise ConfigError(
                key,
                type(heads).__name__,
                f"are the {who}'s heads for rotated boxes, whose regions are not compared",
                "use a loss that compares feature maps",
            )
        if not hasattr(heads, "box_pooler"):
            raise ConfigError(
                key,
                type(detector).__name__,
                f"is a {who} without a box head for regions of its FPN",
                "use two-stage detectors, or this loss's one-stage form",
            )
    if teacher.roi_heads.num_classes != student.roi_heads.num_classes:
        raise ConfigError(
            key,
            f"{teacher.roi_heads.num_classes} classes of the teacher",
            f"are not the student's {student.roi_heads.num_classes}",
            "use a teacher trained for these classes, or a loss that compares feature maps",
        )


class RegionTap:
    """Takes a two-stage ``detector``'s sampled regions and class logits from its own forward."""

    def __init__(self, detector: nn.Module):
        self._heads = detector.roi_heads

    @contextmanager
    def capture(self) -> Iterator[Dict[str, Any]]:
        """A context to run the detector's forward in; after it, the yielded dict is filled.

        Yields:
            ``boxes``: per image the sampled Boxes; ``logits``: (R, K + 1), attached to the graph.
        """
        found: Dict[str, Any] = {}

        def take_boxes(module: nn.Module, args: Tuple[Any, ...], output: Tensor) -> None:
            found.setdefault("boxes", args[1])

        def take_logits(
            module: nn.Module, args: Tuple[Any, ...], output: Tuple[Tensor, Tensor]
        ) -> None:
            found.setdefault("logits", output[0])

        with (
            self._heads.box_pooler.register_forward_hook(take_boxes),
            _first(self._heads.box_predictor).register_forward_hook(take_logits),
        ):
            yield found

    @torch.no_grad()
    def labels(self, boxes: List[Boxes], truth: List[Instances]) -> Tensor:
        """The class of each region, (R,) int64, K for background, by the detector's own matching.

        Args:
            boxes: the regions of each image, see :meth:`capture`.
            truth: the ground truth of each image, on any device.
        """
        background = self._heads.num_classes
        labels = []
        for found, instances in zip(boxes, truth):
            objects = instances.gt_boxes.to(found.device)  # and not their masks
            match, kind = self._heads.proposal_matcher(pairwise_iou(objects, found))
            label = torch.full_like(match, background)
            if len(instances):
                classes = instances.gt_classes.to(found.device)
                label = torch.where(kind == 1, classes[match], label)
            labels.append(label)
        return torch.cat(labels)


def region_predictions(
    detector: nn.Module, maps: Dict[int, Tensor], boxes: List[Boxes]
) -> Tuple[Tensor, Tensor]:
    """What a two-stage detector predicts of given regions.

    Args:
        detector: with a box head on its FPN; of a cascade, the first stage is used.
        maps: stride -> (N, C, H, W), its FPN's outputs.
        boxes: the regions of each image, in pixels of the images that the maps show.

    Returns:
        class logits (R, K + 1); box deltas (R, K*4), or (R, 4) that are the same for all classes.
    """
    heads, specs = detector.roi_heads, detector.backbone.output_shape()
    features = [maps[specs[name].stride] for name in heads.box_in_features]
    pooled = heads.box_pooler(features, boxes)
    return _first(heads.box_predictor)(_first(heads.box_head)(pooled))
