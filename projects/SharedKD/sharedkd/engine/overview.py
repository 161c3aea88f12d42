"""What a run will be, in numbers and as text, and what about it is probably not meant."""

import re
from dataclasses import asdict, dataclass, field
from math import lcm
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2.layers import CNNBlockBase
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from torch import nn

from sharedkd.data.coco import CocoSummary
from sharedkd.errors import FAILED, Findings
from sharedkd.modeling.detectors import count_parameters, num_classes
from sharedkd.modeling.hardware import has_bfloat16
from sharedkd.modeling.stages import Stage
from sharedkd.modeling.taps import pyramid_shapes
from sharedkd.modeling.teachers import Teacher

from .hooks.cost import in_words
from .parts import Parts, losses_of

__all__ = ["Detector", "Level", "Measured", "Overview", "StageRow", "advise", "as_text", "describe"]

#: Detectron2's own schedules: SGD with 0.02 for 16 images.  Twice as much per image is suspicious.
SGD_LR_PER_IMAGE, SUSPICIOUS = 0.02 / 16, 2.0
#: How many times as long a pass in bfloat16 takes on a CPU without the instructions, about.
BFLOAT16_SLOWDOWN = 10


@dataclass
class Detector:
    """A detector in words and numbers.

    Args:
        family: its name as people call it.
        backbone: its bottom-up network.
        parameters: how many numbers its parameters hold.
        classes: how many it tells apart; None: unknown.
        masks: whether it predicts masks.
        weights: where they come from.
        name: the config of a teacher.
    """

    family: str
    backbone: str
    parameters: int
    classes: Optional[int]
    masks: bool
    weights: str
    name: str = ""


@dataclass
class Level:
    """Maps of one tap and stride.

    Args:
        tap, stride: where they are taken.
        student_channels, teacher_channels: None: there is no such map.
        map_size: height and width for the first image; None: unknown.
        aligned: stage -> how it makes the maps comparable.
        teachers: name of a further teacher -> its channels.
    """

    tap: str
    stride: int
    student_channels: Optional[int]
    teacher_channels: Optional[int]
    map_size: Optional[Tuple[int, int]]
    aligned: Dict[str, str]
    teachers: Dict[str, Optional[int]] = field(default_factory=dict)


@dataclass
class StageRow:
    """A stage, with its schedule in iterations.

    Args:
        stage: its name.
        loss: its loss's class.
        taps, strides: of the maps that it compares.
        weight, relative: see :class:`~sharedkd.modeling.stages.Stage`.
        start, end: the first iteration that uses it, and the first that no longer does.
        ramp: over how many iterations its weight grows.
        parameters: how many the loss has.
        teacher: the name of its source of maps; None: ``model.teacher``.
    """

    stage: str
    loss: str
    taps: List[str]
    strides: List[int]
    weight: float
    relative: bool
    start: int
    ramp: int
    end: int
    parameters: int
    teacher: Optional[str] = None


@dataclass
class Measured:
    """What training steps cost here: seconds, and the peak memory of this process or its GPU."""

    seconds_per_step: float
    total_seconds: float
    peak_memory_mb: float


@dataclass
class Overview:
    """What is known of a run, as far as it could be built.

    Args:
        output_dir, device, max_iter: of ``train``.
        images_per_step: of all processes together.
        image_size: height and width of the first image as the student gets it, in pixels.
        processes: how many train.
        data: ``train`` and ``test`` -> counts of their annotations.
        disk: see :func:`~sharedkd.engine.disk.check_disk`.
        student, teacher: None if there is none, or if it could not be built.
        teachers: the further ones, by name.
        levels: the maps that stages may use.
        stages: the stages.
        measured: None: not measured.
    """

    output_dir: str
    device: str
    max_iter: int
    images_per_step: Optional[int]
    image_size: Optional[Tuple[int, int]]
    processes: int
    data: Dict[str, Dict[str, Any]]
    disk: Optional[Mapping[str, float]] = None
    student: Optional[Detector] = None
    teacher: Optional[Detector] = None
    teachers: Dict[str, Detector] = field(default_factory=dict)
    levels: List[Level] = field(default_factory=list)
    stages: List[StageRow] = field(default_factory=list)
    measured: Optional[Measured] = None

    def as_dict(self) -> Dict[str, Any]:
        """As nested dicts for JSON, without what is not known."""
        unknown = ("disk", "student", "teacher", "measured")
        return {k: v for k, v in asdict(self).items() if v is not None or k not in unknown}


def describe(parts: Parts) -> Overview:
    """What is known of a run.

    Args:
        parts: what :func:`~sharedkd.engine.parts.assemble` made of its config.
    """
    cfg = parts.cfg
    readable = {split: [x for x in getattr(parts.data, split) if x] for split in ("train", "test")}
    found = Overview(
        output_dir=cfg.train.output_dir,
        device=cfg.train.device,
        max_iter=cfg.train.max_iter,
        images_per_step=_images_per_step(cfg),
        image_size=tuple(parts.sample["image"].shape[-2:]) if parts.sample else None,
        processes=comm.get_world_size(),
        data={split: _numbers(summaries) for split, summaries in readable.items() if summaries},
        disk=parts.disk,
    )
    if parts.model is FAILED:
        return found
    student, teachers = parts.student, dict(parts.teachers)
    found.student = _detector(student, _student_weights(parts))
    described = {name: _teacher(teacher) for name, teacher in teachers.items()}
    found.teacher, found.teachers = described.pop(None, None), described
    stages = parts.model.stages if losses_of(parts.model) else {}
    found.levels = _levels(student, teachers, stages, parts.sample)
    found.stages = [_stage(name, stage, cfg.train.max_iter) for name, stage in stages.items()]
    return found


def _detector(model: nn.Module, weights: str, name: str = "") -> Detector:
    return Detector(
        family=family(model),
        backbone=backbone(model),
        parameters=count_parameters(model),
        classes=num_classes(model),
        masks=bool(getattr(getattr(model, "roi_heads", None), "mask_on", False)),
        weights=weights,
        name=name,
    )


def _teacher(teacher: Teacher) -> Detector:
    """A :class:`FrozenTeacher`, or another source of maps, of which less may be known."""
    name = getattr(teacher, "name", type(teacher).__name__)
    if teacher.detector is None:
        return Detector(name, "unknown", 0, None, False, "unknown", name)
    weights = getattr(teacher, "weights", "unknown")
    if hasattr(teacher, "tensors"):
        weights += f", verified: all {teacher.tensors} tensors" if weights else ""
    return _detector(teacher.detector, weights or "none, it is not trained", name)


def family(model: nn.Module) -> str:
    """A detector's name as people call it."""
    heads = getattr(model, "roi_heads", None)
    if heads is None:
        return type(model).__name__
    cascade, mask = isinstance(heads, CascadeROIHeads), getattr(heads, "mask_on", False)
    kind = "Mask " if mask else "" if cascade else "Faster "
    return f"{'Cascade ' if cascade else ''}{kind}R-CNN"


def backbone(model: nn.Module) -> str:
    """The bottom-up network's name; of a ResNet with its depth."""
    network = getattr(model.backbone, "bottom_up", model.backbone)
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
    words = f"{given}, verified: {parts.loaded} of {of} tensors" if given else "random"
    return words + (f", {len(parts.inherited)} tensors of the teacher" if parts.inherited else "")


def _images_per_step(cfg: DictConfig) -> Optional[int]:
    batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    return batch * cfg.train.accumulate if isinstance(batch, int) else None


def _numbers(summaries: Sequence[CocoSummary]) -> Dict[str, Any]:
    """The counts of some data sets together, and their classes."""
    names = ("images", "objects", "crowds", "empty_images", "broken_annotations", "unmasked")
    return {
        "files": [x.json_file for x in summaries],
        **{name: sum(getattr(x, name) for x in summaries) for name in names},
        "classes": len(summaries[0].classes),
    }


def _levels(
    student: nn.Module,
    teachers: Mapping[Optional[str], Teacher],
    stages: Mapping[str, Stage],
    sample: Optional[Mapping[str, Any]],
) -> List[Level]:
    """A row per tap and stride that some pyramid has and some stage might use."""
    ours, theirs = pyramid_shapes(student), {name: x.shapes for name, x in teachers.items()}
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
            size = _map_size([student, *(x.detector for x in teachers.values())], sample, stride)
            rows.append(Level(tap, stride, s, channels.pop(None, None), size, aligned, channels))
    return rows


def _map_size(
    detectors: Sequence[Optional[nn.Module]], sample: Optional[Mapping[str, Any]], stride: int
) -> Optional[Tuple[int, int]]:
    """(height, width) of a map of the first image."""
    if not sample:
        return None
    pad = lcm(*(max(x.backbone.size_divisibility, 1) for x in detectors if x is not None))
    height, width = (-(-side // pad) * pad for side in sample["image"].shape[-2:])
    return -(-height // stride), -(-width // stride)


def _stage(name: str, stage: Stage, max_iter: int) -> StageRow:
    start, end = stage.span(max_iter)
    return StageRow(
        stage=name,
        loss=type(stage.loss).__name__,
        taps=sorted(stage.loss.taps),
        strides=list(stage.loss.strides or []),
        weight=stage.weight,
        relative=stage.relative,
        start=start,
        ramp=round(stage.ramp * max_iter) if isinstance(stage.ramp, float) else stage.ramp,
        end=end,
        parameters=count_parameters(stage.loss),
        teacher=stage.teacher,
    )


# --- warnings -----------------------------------------------------------------------------------


def advise(parts: Parts, findings: Findings) -> None:
    """Warn of what works, and is probably not meant.

    Args:
        parts: see :func:`describe`.
        findings: takes the warnings.
    """
    cfg, train, warn = parts.cfg, parts.cfg.train, findings.warn
    if not parts.resuming and not train.init_checkpoint and not train.inherit:
        fix = "set it to an ImageNet backbone or a detector if there is one"
        warn("train.init_checkpoint", "''", "the student starts from random weights", fix)
    if cfg.dataloader.get("evaluator") is None:
        fix = "set it to a DatasetEvaluator"
        warn("dataloader.evaluator", None, "nothing is evaluated", fix)
    elif train.eval_period == 0:
        fix = "set a number of iterations to follow the run"
        warn("train.eval_period", 0, "the student is evaluated at the end alone", fix)
    if train.checkpointer.period > train.max_iter and not train.fast_dev_run:
        problem = f"there is no checkpoint before the end at {train.max_iter}"
        fix = "set fewer iterations, or an interrupted run starts anew"
        warn("train.checkpointer.period", train.checkpointer.period, problem, fix)
    disk = parts.disk
    if disk and disk["free_mb"] < disk["needed_mb"]:
        problem = (
            f"{disk['needed_mb']:.0f} MB of checkpoints on a disk with {disk['free_mb']:.0f} MB"
        )
        fix = "keep fewer by train.checkpointer.max_to_keep, or choose another disk"
        warn("train.output_dir", train.output_dir, problem, fix)
    _advise_precision(parts, findings)
    _advise_optimizer(cfg, parts.optimizer, findings)
    _advise_data(parts, findings)
    if parts.model is not FAILED and losses_of(parts.model):
        _advise_pair(parts, findings)


def _key(name: Optional[str]) -> str:
    """Where a teacher stands in the config."""
    return "model.teacher" if name is None else f"model.teachers.{name}"


def _advise_precision(parts: Parts, findings: Findings) -> None:
    cfg = parts.cfg
    if torch.device(cfg.train.device).type != "cpu" or has_bfloat16():
        return
    problem = (
        f"this CPU has no instructions for bfloat16: about {BFLOAT16_SLOWDOWN} times as slow as "
        "float32"
    )
    if cfg.train.amp.enabled and cfg.train.amp.dtype in (None, "bfloat16"):
        findings.warn("train.amp.enabled", True, problem, "use train.amp.enabled=False")
    for name, teacher in parts.teachers.items():
        if getattr(teacher, "precision", None) == "bfloat16":
            key = f"{_key(name)}.precision"
            findings.warn(key, "bfloat16", problem, f"use {key}=float32")


def _advise_optimizer(
    cfg: DictConfig, optimizer: Optional[torch.optim.Optimizer], findings: Findings
) -> None:
    if not optimizer:
        return
    lr, name = max(group["lr"] for group in optimizer.param_groups), type(optimizer).__name__
    images = _images_per_step(cfg)
    if lr == 0:
        findings.warn("optimizer.lr", lr, "nothing is learnt", "use a value above 0")
    elif name == "SGD" and images and lr > SUSPICIOUS * SGD_LR_PER_IMAGE * images:
        usual = SGD_LR_PER_IMAGE * images
        problem = (
            f"is high for SGD with {images} images a step; Detectron2's own schedules scale to"
        )
        findings.warn("optimizer.lr", lr, f"{problem} {usual:.2g}", f"use {usual:.2g} or so")


def _advise_data(parts: Parts, findings: Findings) -> None:
    train, test = parts.data.usable("train"), parts.data.usable("test")
    for summary in test:
        if summary.json_file in {x.json_file for x in train}:
            problem = "is the training data, too: figures say nothing about other images"
            fix = "use images held out of training"
            findings.warn(summary.key, summary.json_file, problem, fix)


def _advise_pair(parts: Parts, findings: Findings) -> None:
    ours, max_iter = num_classes(parts.student), parts.cfg.train.max_iter
    for name, teacher in parts.teachers.items():
        theirs = None if teacher.detector is None else num_classes(teacher.detector)
        if theirs not in (None, ours):
            problem = f"The teacher has {theirs} classes, the student {ours}: the teacher's head is unused"
            fix = "its feature maps are what counts"
            findings.warn(f"{_key(name)}.config", _teacher(teacher).name, problem, fix)
        if getattr(teacher, "weights", None) == "":
            fix = "set it to a trained detector's weights"
            findings.warn(f"{_key(name)}.weights", "''", "the teacher is not trained", fix)
    for name, stage in parts.model.stages.items():
        key, row = f"model.stages.{name}", _stage(name, stage, max_iter)
        if row.start == row.end:
            problem = f"never begins within train.max_iter={max_iter}"
            findings.warn(f"{key}.start", stage.start, problem, "start earlier or train longer")
        elif row.ramp > row.end - row.start:
            problem = (
                f"does not reach its full weight: it is on for {row.end - row.start} iterations"
            )
            findings.warn(f"{key}.ramp", stage.ramp, problem, "use a shorter ramp")


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
            "weight": f"{x.weight:g}{' of the loss' if x.relative else ''}",
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
