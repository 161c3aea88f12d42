"""The base of all distillation losses: feature maps in, named scalars out.

A new loss is one file with one subclass.
"""

import logging
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, FrozenSet, Iterable, Iterator, List, Optional, Set, Tuple

import torch
from detectron2.structures import RotatedBoxes
from torch import Tensor, nn

from sharedkd.errors import ConfigError
from sharedkd.values import check_choice, check_number

from .adapter import adapters

__all__ = [
    "HEAD_TAPS",
    "TAPS",
    "UNLABELLED",
    "Shapes",
    "Maps",
    "Regions",
    "Batch",
    "DistillationLoss",
    "check_weights",
    "precise",
    "precision",
]

logger = logging.getLogger("detectron2.sharedkd")

#: Where maps are taken: ``fpn``, the backbone's outputs; ``backbone``, its bottom-up stages; and the
#: outputs of the dense head (that of RetinaNet or FCOS, or the RPN of a two-stage detector) with A
#: anchors a position and K classes (the RPN: K = 1): ``logits`` (N, A*K, H, W), ``deltas``
#: (N, A*4, H, W), ``boxes`` (N, A*4, H, W), the deltas applied to their anchors, and without a gradient
#: ``anchors`` (N, A*4, H, W) themselves, the same for all images, both XYXY in pixels.
TAPS = ("fpn", "backbone", "logits", "deltas", "boxes", "anchors")
HEAD_TAPS = frozenset(TAPS[2:])

UNLABELLED = "unlabelled"  #: the key that is true in records of images without labels

Shapes = Dict[str, Dict[int, int]]  #: tap -> stride -> channels
Maps = Dict[str, Dict[int, Tensor]]  #: tap -> stride -> map (N, C, H, W)


@dataclass
class Regions:
    """What both detectors predict of the R regions that a two-stage student samples.

    Args:
        labels: (R,) int64, the class of each region's ground truth; K is background.
        student: (R, K + 1) class logits, attached to the student's graph.
        teacher: (R, K + 1) class logits of the teacher's head for the same regions, on its own maps;
            None until it has run.
        deltas: (R, K*4) the teacher's box deltas beside them, or (R, 4) that are the same for all classes.
        crossed: number of layers left -> the logits and deltas that the teacher's box head makes of what the
            student's has before its last so many layers, attached to the student's graph.  None when no
            active loss needs it.
    """

    labels: Tensor
    student: Tensor
    teacher: Optional[Tensor] = None
    deltas: Optional[Tensor] = None
    crossed: Optional[Callable[[int], Tuple[Tensor, Tensor]]] = None


@dataclass
class Batch:
    """Everything that a loss may read in one step.

    Args:
        student: the student's maps, attached to its graph.
        teacher: the teacher's maps of the same pixels, without gradient; None when no active loss
            needs a teacher.
        image_sizes: (height, width) of each image in pixels, before padding.
        inputs: the data loader's records, with ``instances`` (ground truth).
        regions: None when no active loss needs them.
        labels: stride -> (N, A, H, W) int64, the class of each anchor by a one-stage student's own
            matching; K is background, -1 ignored.  None when no active loss needs them.
        crossed: number of convolutions left -> the maps ``logits`` and ``boxes`` that the teacher's
            one-stage head makes of what the student's head has before its last so many convolutions, attached
            to the student's graph.  None when no active loss needs it, and for two-stage heads, see ``regions``.
    """

    student: Maps
    teacher: Optional[Maps]
    image_sizes: List[Tuple[int, int]]
    inputs: List[Dict[str, Any]] = field(default_factory=list)
    regions: Optional[Regions] = None
    labels: Optional[Dict[int, Tensor]] = None
    crossed: Optional[Callable[[int], Maps]] = None

    @property
    def boxes(self) -> List[Tensor]:
        """The ground truth of each image: (number of objects, 4), XYXY in pixels; 0 rows without any.

        Of rotated boxes, those that enclose them.
        """
        device = next(x for levels in self.student.values() for x in levels.values()).device
        return [_boxes(x).to(device, non_blocking=True) for x in self.inputs]

    @property
    def classes(self) -> List[Tensor]:
        """The class of each of :attr:`boxes`: per image (number of objects,) int64."""
        device = next(x for levels in self.student.values() for x in levels.values()).device
        none = torch.zeros(0, dtype=torch.int64)
        there = (x.get("instances") for x in self.inputs)
        classes = (none if x is None else x.gt_classes for x in there)
        return [x.to(device, non_blocking=True) for x in classes]

    def inside(self, x: Tensor, stride: int) -> Optional[Tensor]:
        """Find the positions of a map that lie on their image and not on its padding.

        Args:
            x: (N, C, H, W) map of the padded images.
            stride: of the map, in pixels; a position that covers some of the image is inside.

        Returns:
            (N, 1, H, W) bool tensor; None when there is no padding.
        """
        height, width = x.shape[-2:]
        sizes = [(-(-h // stride), -(-w // stride)) for h, w in self.image_sizes]
        if all(h >= height and w >= width for h, w in sizes):
            return None
        beside = torch.tensor(sizes).to(x.device, non_blocking=True)  # nothing waits for a GPU
        h, w = beside.view(-1, 2, 1, 1).unbind(1)
        rows = torch.arange(height, device=x.device).view(1, -1, 1) < h
        columns = torch.arange(width, device=x.device).view(1, 1, -1) < w
        return (rows & columns).unsqueeze(1)


def _boxes(record: Dict[str, Any]) -> Tensor:
    """The boxes of a record, (number of objects, 4), XYXY in pixels."""
    if "instances" not in record:
        return torch.zeros(0, 4)
    boxes = record["instances"].gt_boxes
    if not isinstance(boxes, RotatedBoxes):
        return boxes.tensor
    x, y, w, h, angle = boxes.tensor.unbind(1)
    cos, sin = torch.deg2rad(angle).cos().abs(), torch.deg2rad(angle).sin().abs()
    half = torch.stack([w * cos + h * sin, w * sin + h * cos], 1) / 2
    centre = torch.stack([x, y], 1)
    return torch.cat([centre - half, centre + half], 1)


def check_weights(**weights: float) -> None:
    """Check the weights of a loss's terms, each under the name of its argument.

    Raises:
        ConfigError: one is negative or not a finite number.
    """
    for name, value in weights.items():
        check_number(name, value, least=0)


def _has_level(module: nn.Module, stride: int) -> bool:
    return isinstance(module, nn.ModuleDict) and str(stride) in module


def check_strides(strides: Iterable[int]) -> List[int]:
    """Check and sort a list of strides.

    Raises:
        ConfigError: it is no list, it is empty, or it has other than different whole numbers above 0.
    """
    several = isinstance(strides, Iterable) and not isinstance(strides, str)
    found = list(strides) if several else []
    if not found or any(type(s) is not int or s < 1 for s in found) or len({*found}) < len(found):
        raise ConfigError(
            "strides",
            found if several else repr(strides),
            "is no list of levels by their strides",
            "use a list such as [8,16,32], or null for all levels",
        )
    return sorted(found)


def precision(x: Tensor) -> torch.dtype:
    """The type to compute in, with or without autocast: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def precise(x: Tensor) -> Tensor:
    """Convert ``x`` to its :func:`precision`."""
    return x.to(precision(x))


class DistillationLoss(nn.Module):
    """Base of all distillation losses.

    A subclass declares in ``needs`` what it reads besides the student's maps (``teacher``,
    ``boxes``, ``regions``, ``labels`` or ``crossed``, see :class:`Batch`) and in ``taps`` where maps
    are taken.  :meth:`bind` checks both pyramids and creates the parameters.  :meth:`forward` reads
    maps through :meth:`levels` and returns named scalars.  Weights of the terms of one loss are
    arguments without a default: configs/common/methods has the published ones.

    Example of a config line::

        model.stages.my_loss = L(Stage)(loss=L(MyLoss)(tap="fpn"), weight=1.0)
    """

    needs: FrozenSet[str] = frozenset({"teacher"})
    #: Taps that only say where and how much to compare, or that are computed from another tap: an automatic
    #: weight reads the gradients at the others.
    guides: FrozenSet[str] = frozenset({"boxes", "anchors"})
    #: Taps on which both dense heads need the same channels, those of their anchors and classes.
    same_head: Tuple[str, ...] = ()
    #: Whether :meth:`bind` makes ``adapters`` of the student's maps: by level, of the kernel ``adapter``.
    adapts = False
    idle = False  # whether it found nothing to compare when it was bound
    published = False  # whether strides that a pair does not have are left out; see Stage

    def __init__(self, tap: str = "fpn", strides: Optional[List[int]] = None):
        """Set where the maps are taken, and of which levels.

        Args:
            tap: where maps are taken: ``fpn``, ``backbone``, or another of :data:`TAPS`.
            strides: the levels to use, by stride; None: every common level.

        Raises:
            ConfigError: unknown tap, or a list without strides.
        """
        super().__init__()
        check_choice("tap", tap, TAPS)
        self.tap = tap
        self.strides = None if strides is None else check_strides(strides)

    @property
    def taps(self) -> FrozenSet[str]:
        """Where maps are taken in both detectors; empty for a loss that reads no maps."""
        return frozenset({self.tap})

    def bind(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        """Choose the levels to use, and make their adapters; called once, when the pair is built.

        Args:
            student, teacher: the channels of every level of both pyramids.
            key: this loss's place in the config, for messages.

        Raises:
            ConfigError: there is no teacher, a stride that was asked for is missing, no common level
                is left, the dense heads differ, or a subclass cannot work with these levels.
        """
        if "teacher" in self.needs and teacher is None:
            raise ConfigError(
                key,
                type(self).__name__,
                "needs a teacher, and model.teacher is not set",
                "set model.teacher or remove this stage",
            )
        if not self.taps:  # it reads no maps
            self.strides = []
            return
        ours = there = self._strides(student, "student", key)
        if "teacher" in self.needs:
            there = self._strides(teacher, "teacher", key)
        levels = ours & there
        where, wanted = "/".join(sorted(self.taps)), set(self.strides or levels)
        missing, usable = sorted(wanted - levels), sorted(levels & wanted)
        if levels and missing and not (self.published and usable):
            raise ConfigError(
                f"{key}.strides",
                self.strides,
                f"no level of stride {missing} on the {where} tap of this pair, usable are {sorted(levels)}",
                f"use {key}.strides=[{','.join(map(str, usable or sorted(levels)))}], or null for all",
            )
        levels &= wanted
        if not levels:
            theirs = f" and teacher levels {sorted(there)}" if "teacher" in self.needs else ""
            raise ConfigError(
                key,
                type(self).__name__,
                f"student levels {sorted(ours)}{theirs} on the {where} tap have no stride in common",
                "choose another tap or another teacher",
            )
        alone = sorted((ours | there | wanted) - levels)
        if alone:
            level = logging.WARNING if missing else logging.INFO
            words = f"levels of stride {alone} on the {where} tap have no part in it"
            logger.log(level, f"{key}: {words}; it uses {sorted(levels)}")
        self.strides = sorted(levels)
        self._check_same_head(student, teacher, key)
        if self.adapts:
            self.adapters = adapters(
                self.adapter, student[self.tap], teacher[self.tap], self.strides, f"{key}.adapter"
            )

    def _check_same_head(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        """Check that both dense heads have the same channels on the taps ``same_head``."""
        for tap in self.same_head:
            for stride in self.strides:
                ours, theirs = student[tap][stride], teacher[tap][stride]
                if ours != theirs:
                    raise ConfigError(
                        key,
                        type(self).__name__,
                        f"the student's {tap} of stride {stride} have {ours} channels, the teacher's {theirs}: "
                        "other classes, other anchors or another kind of detector",
                        "use a teacher of the student's family, trained for the same classes",
                    )

    def _strides(self, shapes: Shapes, who: str, key: str) -> Set[int]:
        """The strides that a pyramid has on every tap of this loss."""
        for tap in sorted(self.taps):
            if not shapes.get(tap):
                raise ConfigError(
                    f"{key}.tap",
                    tap,
                    f"the {who} has no such maps, only {sorted(shapes)}",
                    "use another tap or another loss",
                )
        return set.intersection(*(set(shapes[tap]) for tap in self.taps))

    def check_record(self, record: Dict[str, Any], key: str) -> None:
        """Check that a training record has what the loss reads.

        Args:
            record: of the data loader.
            key: this loss's place in the config, for messages.

        Raises:
            ConfigError: it reads the boxes of objects, and there are none.
        """
        if "boxes" in self.needs and not hasattr(record.get("instances"), "gt_boxes"):
            raise ConfigError(
                key,
                type(self).__name__,
                "needs the boxes of objects, and the data loader's records have none (`instances`)",
                "use a loss that compares maps alone, such as those of shared_kd, cwd, mgd or pkd",
            )

    def reads_scores(self, dense: bool) -> bool:
        """Whether it compares class scores with a teacher's.

        Args:
            dense: the student's ``logits`` are class scores; a two-stage student's are its RPN's, which knows
                no classes.
        """
        scores = {"regions", "labels"} & self.needs or (dense and "logits" in self.taps)
        return "teacher" in self.needs and bool(scores)

    def aligned(self, stride: int, student: Optional[int], teacher: Optional[int]) -> str:
        """Describe in words how the maps of a level are made comparable.

        Args:
            stride: one of :attr:`strides`.
            student, teacher: channels of the level; None where there is no map.
        """
        for module in self.modules():
            learned = module[str(stride)] if _has_level(module, stride) else None
            if isinstance(learned, nn.Conv2d):
                size, (i, o) = learned.kernel_size[0], (learned.in_channels, learned.out_channels)
                return f"student's by a {size}x{size} convolution, {i} to {o} channels"
        return "as they are" if student == teacher else "by the loss itself"

    def levels(
        self, batch: Batch, tap: Optional[str] = None
    ) -> Iterator[Tuple[int, Tensor, Optional[Tensor]]]:
        """Iterate over the maps of the levels in use, in the type to compute in.

        Args:
            batch: the one of this step.
            tap: one of :attr:`taps`; None: the loss's own.

        Yields:
            (stride, student's map, teacher's map or None), in float32 under autocast too.
        """
        tap = tap or self.tap
        for stride in self.strides:
            t = None if batch.teacher is None else precise(batch.teacher[tap][stride])
            yield stride, precise(batch.student[tap][stride]), t

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        """Compute the terms of one step.

        Args:
            batch: maps of both detectors at :attr:`taps`, and what else the loss ``needs``.

        Returns:
            term name (``s8``: the level of stride 8; ``s8_focal``: a part of it) -> scalar tensor,
            not multiplied by the stage's weight.
        """
        raise NotImplementedError
