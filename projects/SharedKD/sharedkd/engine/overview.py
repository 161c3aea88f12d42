"""A description of a run before it starts, in numbers and as text."""

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from detectron2.layers import CNNBlockBase
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from sharedkd.data.coco import CocoSummary
from sharedkd.data.loader import TrainLoader
from sharedkd.errors import FAILED
from sharedkd.modeling.detectors import count_parameters, num_classes
from sharedkd.modeling.preparation import size_divisibility
from sharedkd.modeling.stages import Stage
from sharedkd.modeling.taps import pyramid_shapes
from sharedkd.modeling.teachers import Teacher

from .hooks.cost import in_words
from .parts import Parts, images_per_step, losses_of, pairs_of

__all__ = [
    "Detector",
    "Level",
    "Measured",
    "Overview",
    "StageRow",
    "Unlabelled",
    "as_text",
    "describe",
]


@dataclass
class Detector:
    """A detector in words and numbers."""

    family: str  # such as "Mask R-CNN"
    backbone: str
    parameters: int
    classes: Optional[int]  # None: it does not say
    masks: bool  # whether it predicts them
    weights: str  # where they come from
    name: str = ""  # a teacher's config


@dataclass
class Level:
    """The maps of one tap and stride; None: there are none, or it is unknown."""

    tap: str
    stride: int
    student_channels: Optional[int]
    teacher_channels: Optional[int]
    teachers: Dict[str, Optional[int]]  # the channels of the further teachers
    map_size: Optional[Tuple[int, int]]  # (height, width), of the first image
    aligned: Dict[str, str]  # stage -> how it makes the maps comparable


@dataclass
class StageRow:
    """A stage, with its schedule in iterations."""

    stage: str
    loss: str
    teacher: Optional[str]  # the name of its source of maps
    taps: List[str]
    strides: List[int]
    weight: str  # number, or auto with its share
    start: int  # the first iteration that uses it
    ramp: int
    end: int  # the first one that no longer does; 0: none uses it
    parameters: int


@dataclass
class Unlabelled:
    """The images without labels."""

    images: int
    images_per_step: int  # of all processes, on top of the others
    stages: List[str]  # that learn from them


@dataclass
class Measured:
    """Measured time and memory of training steps, without evaluations."""

    seconds_per_step: float
    total_seconds: float
    peak_memory_mb: float  # of this process or its GPU


@dataclass
class Overview:
    """The description of a run; None: it has none of it, or it could not be built."""

    output_dir: str
    device: str
    max_iter: int
    images_per_step: Optional[int]  # of all processes
    image_size: Optional[Tuple[int, int]]  # (height, width) of the first image for the student
    processes: int
    data: Dict[str, Dict[str, Any]]  # train and test -> counts
    unlabelled: Optional[Unlabelled] = None
    disk: Optional[Mapping[str, float]] = None  # see check_disk
    student: Optional[Detector] = None
    teacher: Optional[Detector] = None
    teachers: Dict[str, Detector] = field(default_factory=dict)  # the further ones
    levels: List[Level] = field(default_factory=list)
    stages: List[StageRow] = field(default_factory=list)
    measured: Optional[Measured] = None

    def as_dict(self) -> Dict[str, Any]:
        """As nested dicts for JSON, without unknown values."""
        unknown = ("disk", "student", "teacher", "measured", "unlabelled")
        return {k: v for k, v in asdict(self).items() if v is not None or k not in unknown}


def describe(parts: Parts) -> Overview:
    """Describe a run.

    Args:
        parts: the result of :func:`~sharedkd.engine.parts.assemble`.
    """
    cfg = parts.cfg
    readable = {split: [x for x in getattr(parts.data, split) if x] for split in ("train", "test")}
    found = Overview(
        output_dir=cfg.train.output_dir,
        device=cfg.train.device,
        max_iter=cfg.train.max_iter,
        images_per_step=images_per_step(cfg),
        image_size=tuple(parts.sample["image"].shape[-2:]) if parts.sample else None,
        processes=comm.get_world_size(),
        data={split: _numbers(summaries) for split, summaries in readable.items() if summaries},
        disk=parts.disk,
    )
    if parts.model is FAILED:
        return found
    student, teachers = parts.student, getattr(parts.model, "sources", {})
    found.student = _detector(student, _student_weights(parts))
    described = {name: _teacher(teacher) for name, teacher in teachers.items()}
    found.teacher, found.teachers = described.pop(None, None), described
    stages = parts.model.stages if losses_of(parts.model) else {}
    peers = [*pairs_of(parts.model).items()][1:]
    pyramid = getattr(parts.model, "pyramid", None)
    found.levels = _levels(student, pyramid, teachers, stages, parts.sample)
    if isinstance(parts.loader, TrainLoader) and parts.loader.unlabelled:
        found.unlabelled = Unlabelled(
            images=parts.loader.unlabelled,
            images_per_step=parts.loader.unlabelled_batch_size * cfg.train.accumulate,
            stages=[
                f"{owner}{name}"
                for owner, pair in pairs_of(parts.model).items()
                for name in pair.stages
                if pair.sees_unlabelled(name)
            ],
        )
    every = {f"{owner}{name}": x for owner, pair in peers for name, x in pair.stages.items()}
    found.stages = [
        _stage(name, stage, cfg.train.max_iter) for name, stage in {**stages, **every}.items()
    ]
    return found


def _detector(model: nn.Module, weights: str, name: str = "") -> Detector:
    return Detector(
        family=_family(model),
        backbone=_backbone(model),
        parameters=count_parameters(model),
        classes=num_classes(model),
        masks=bool(getattr(getattr(model, "roi_heads", None), "mask_on", False)),
        weights=weights,
        name=name,
    )


def _teacher(teacher: Teacher) -> Detector:
    """Describe a teacher; only a :class:`FrozenTeacher` has all values."""
    name = getattr(teacher, "name", type(teacher).__name__)
    if teacher.detector is None:
        return Detector(name, "unknown", 0, None, False, "unknown", name)
    weights = getattr(teacher, "weights", "unknown")
    if hasattr(teacher, "tensors"):
        weights += f", verified: all {teacher.tensors} tensors" if weights else ""
    return _detector(teacher.detector, weights or "none, it is not trained", name)


def _family(model: nn.Module) -> str:
    """The usual name of a detector's architecture."""
    heads = getattr(model, "roi_heads", None)
    if heads is None:
        return type(model).__name__
    cascade, mask = isinstance(heads, CascadeROIHeads), getattr(heads, "mask_on", False)
    kind = "Mask " if mask else "" if cascade else "Faster "
    return f"{'Cascade ' if cascade else ''}{kind}R-CNN"


def _backbone(model: nn.Module) -> str:
    """The bottom-up network's name; of a ResNet with its depth."""
    backbone = getattr(model, "backbone", model)
    network = getattr(backbone, "bottom_up", backbone)
    name = type(network).__name__
    if name != "ResNet":
        return name
    blocks = [m for m in network.modules() if isinstance(m, CNNBlockBase)]
    convolutions = [m for b in blocks for n, m in b.named_children() if re.fullmatch(r"conv\d", n)]
    grouped = any(getattr(m, "groups", 1) > 1 for m in convolutions)
    return f"{'ResNeXt' if grouped else 'ResNet'}-{len(convolutions) + 1}"  # and the classifier


def _student_weights(parts: Parts) -> str:
    if parts.resuming:
        return "the last checkpoint of the run in the output folder"
    given, of = parts.cfg.train.init_checkpoint, len(parts.student.state_dict())
    words = f"{given}, verified: {parts.loaded.tensors} of {of} tensors" if given else "random"
    return words + (f", {len(parts.inherited)} tensors of the teacher" if parts.inherited else "")


def _numbers(summaries: Sequence[CocoSummary]) -> Dict[str, Any]:
    """The summed counts of data sets, and their classes."""
    names = [f.name for f in fields(CocoSummary) if f.type is int]
    return {
        "files": [x.json_file for x in summaries],
        **{name: sum(getattr(x, name) for x in summaries) for name in names},
        "classes": len(summaries[0].classes),
    }


def _levels(
    student: nn.Module,
    pyramid: Optional[str],
    teachers: Mapping[Optional[str], Teacher],
    stages: Mapping[str, Stage],
    sample: Optional[Mapping[str, Any]],
) -> List[Level]:
    """One row per tap and stride that a pyramid has and a stage may use."""
    ours = pyramid_shapes(student, pyramid)
    theirs = {name: x.shapes for name, x in teachers.items()}
    used = {tap for stage in stages.values() for tap in stage.loss.taps} | {"fpn"}
    rows = []
    for tap in (tap for tap in ours if tap in used):
        pyramids = {name: shapes.get(tap, {}) for name, shapes in theirs.items()}
        for stride in sorted({*ours[tap], *(s for x in pyramids.values() for s in x)}):
            s = ours[tap].get(stride)
            channels = {name: x.get(stride) for name, x in pyramids.items()}
            aligned = {
                name: stage.loss.aligned(stride, s, channels.get(stage.teacher))
                for name, stage in stages.items()
                if tap in stage.loss.taps and stride in stage.loss.strides
            }
            size = _map_size(student, sample, stride)
            rows.append(Level(tap, stride, s, channels.pop(None, None), channels, size, aligned))
    return rows


def _map_size(
    student: nn.Module, sample: Optional[Mapping[str, Any]], stride: int
) -> Optional[Tuple[int, int]]:
    """(height, width) of a map of the first image."""
    if not sample:
        return None
    pad = max(size_divisibility(student), 1)
    height, width = (-(-side // pad) * pad for side in sample["image"].shape[-2:])
    return -(-height // stride), -(-width // stride)


def _stage(name: str, stage: Stage, max_iter: int) -> StageRow:
    start, end = stage.span(max_iter)
    return StageRow(
        stage=name,
        loss=type(stage.loss).__name__,
        teacher=stage.teacher,
        taps=sorted(stage.loss.taps),
        strides=list(stage.loss.strides or []),
        weight=str(stage).removeprefix("weight "),
        start=start,
        ramp=round(stage.ramp * max_iter) if isinstance(stage.ramp, float) else stage.ramp,
        end=end,
        parameters=count_parameters(stage.loss),
    )


# --- text ---------------------------------------------------------------------------------------


def as_text(found: Overview) -> str:
    """``found`` as text."""
    blocks = [_detectors(found), _level_table(found), _stage_table(found), _data_table(found)]
    return "\n\n".join(x for x in (*blocks, "\n".join(_costs(found))) if x)


def _detectors(found: Overview) -> str:
    if found.student is None:
        return ""
    if found.teacher is None and not found.teachers and not found.stages:
        return _line("model", found.student)
    further = [_line(f"teacher {name}", x) for name, x in found.teachers.items()]
    first = [] if found.teacher is None and further else [_line("teacher", found.teacher)]
    return "\n".join([_line("student", found.student), *first, *further])


def _line(who: str, x: Optional[Detector]) -> str:
    if x is None:
        return f"{who}: none"
    return (
        f"{who}: {x.family}, {x.backbone}, {x.parameters / 1e6:.1f} M parameters, {x.classes} classes; "
        f"weights: {x.weights}"
    )


def _level_table(found: Overview) -> str:
    pair = found.teacher is not None or found.teachers or found.stages
    rows = []
    for x in found.levels:
        row: Dict[str, Any] = {"tap": x.tap, "stride": x.stride}
        row["student's channels" if pair else "channels"] = x.student_channels
        if found.teacher is not None:
            row["teacher's"] = x.teacher_channels
        row.update({f"{name}'s": channels for name, channels in x.teachers.items()})
        row["map"] = "x".join(map(str, x.map_size or ()))
        if found.stages:
            row["made comparable"] = "; ".join(f"{name}: {how}" for name, how in x.aligned.items())
        rows.append(row)
    return _table([list(row.values()) for row in rows], list(rows[0])) if rows else ""


def _stage_table(found: Overview) -> str:
    rows = [
        {
            "stage": x.stage,
            "loss": x.loss,
            **({"teacher": x.teacher} if found.teachers else {}),
            "tap": "/".join(x.taps),
            "weight": x.weight,
            "iterations": f"{x.start} - {x.end}" if x.end else "never",
            "ramp": x.ramp,
            "parameters": f"{x.parameters:,}",
        }
        for x in found.stages
    ]
    return _table([list(row.values()) for row in rows], list(rows[0])) if rows else ""


def _data_table(found: Overview) -> str:
    if not found.data:
        return ""
    hidden = {"files"} if found.student is None or found.student.masks else {"files", "unmasked"}
    names = [name for name in next(iter(found.data.values())) if name not in hidden]
    rows = [[split, *(x[name] for name in names)] for split, x in found.data.items()]
    return _table(rows, ["data", *(name.replace("_", " ") for name in names)])


def _table(rows: List[List[Any]], head: List[str]) -> str:
    return tabulate(rows, head, tablefmt="simple", missingval="-", disable_numparse=True)


def _costs(found: Overview) -> List[str]:
    lines: List[str] = []
    train = found.data.get("train")
    if train and found.images_per_step:
        epochs = found.max_iter * found.images_per_step / train["images"]
        lines.append(
            f"length: {found.max_iter} iterations of {found.images_per_step} images, "
            f"{epochs:.3g} epochs; the first image is {'x'.join(map(str, found.image_size or '?'))}"
        )
    if found.unlabelled:
        x = found.unlabelled
        lines.append(
            f"images without labels: {x.images}, {x.images_per_step} more in each iteration, "
            f"{found.max_iter * x.images_per_step / x.images:.3g} epochs; for the stages {', '.join(x.stages)}"
        )
    disk = found.disk
    if disk:
        lines.append(
            f"disk: {disk['kept']} checkpoints of {disk['checkpoint_mb']:.0f} MB, "
            f"{disk['needed_mb']:.0f} MB with the one being written; {disk['free_mb']:.0f} MB free"
        )
    if found.measured:
        seconds, memory = found.measured.seconds_per_step, found.measured.peak_memory_mb
        lines.append(in_words(seconds, found.max_iter, memory, found.device))
    return lines
