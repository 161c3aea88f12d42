"""What a run will be, in numbers and as text, and what about it is probably not meant."""

import re
from dataclasses import fields
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
from sharedkd.engine.hooks.cost import in_words
from sharedkd.engine.parts import Parts, losses_of
from sharedkd.errors import FAILED, Findings
from sharedkd.modeling.detectors import count_parameters, num_classes
from sharedkd.modeling.hardware import has_bfloat16
from sharedkd.modeling.stages import Stage
from sharedkd.modeling.taps import pyramid_shapes
from sharedkd.modeling.teachers.frozen import FrozenTeacher

__all__ = ["advise", "as_text", "describe"]

#: Detectron2's own schedules: SGD with 0.02 for 16 images.  Twice as much per image is suspicious.
SGD_LR_PER_IMAGE, SUSPICIOUS = 0.02 / 16, 2.0


def describe(cfg: DictConfig, parts: Parts, findings: Findings) -> Dict[str, Any]:
    """What is known of a run, as far as its parts could be built.

    Args:
        cfg: the run's, of :func:`~sharedkd.config.load.load_config`.
        parts: what :func:`~sharedkd.engine.parts.assemble` made of it.
        findings: that of the same call, for its facts.

    Returns:
        ``student`` and ``teacher`` (``family``, ``backbone``, ``parameters``, ``classes``,
        ``masks``, ``weights``); ``levels``, ``stages``: a dict per row; ``data``: split to its numbers;
        ``disk``: see :func:`~sharedkd.engine.disk.check_disk`; ``max_iter``, ``images_per_step``,
        ``image_size`` (height and width of the first image as the student gets it, in pixels);
        ``output_dir``, ``device``, ``processes``.
    """
    found: Dict[str, Any] = {
        "output_dir": cfg.train.output_dir,
        "device": cfg.train.device,
        "max_iter": cfg.train.max_iter,
        "images_per_step": _images_per_step(cfg),
        "image_size": tuple(parts.sample["image"].shape[-2:]) if parts.sample else None,
        "processes": comm.get_world_size(),
        "data": {
            split: _numbers(summaries)
            for split, summaries in findings.facts.get("files", {}).items()
            if summaries
        },
    }
    if findings.facts.get("disk"):
        found["disk"] = findings.facts["disk"]
    model = parts.model
    if model is FAILED:
        return found
    student, teacher = getattr(model, "student", model), getattr(model, "teacher", None)
    found["student"] = {**_detector(student), "weights": _student_weights(cfg, parts, findings)}
    if teacher is not None:
        verified = f"{teacher.weights}, verified: all {teacher.tensors} tensors"
        weights = verified if teacher.weights else "none, it is not trained"
        found["teacher"] = {**_detector(teacher.model), "name": teacher.name, "weights": weights}
    stages = getattr(model, "stages", {}) if losses_of(model) else {}
    found["levels"] = _levels(student, teacher, stages, parts.sample)
    found["stages"] = [_stage(name, stage, cfg.train.max_iter) for name, stage in stages.items()]
    return found


def _detector(model: nn.Module) -> Dict[str, Any]:
    return {
        "family": family(model),
        "backbone": backbone(model),
        "parameters": count_parameters(model),
        "classes": num_classes(model),
        "masks": bool(getattr(getattr(model, "roi_heads", None), "mask_on", False)),
    }


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


def _student_weights(cfg: DictConfig, parts: Parts, findings: Findings) -> str:
    if parts.resuming:
        return "the last checkpoint of the run in the output folder"
    given = cfg.train.init_checkpoint
    loaded = findings.facts.get("student_tensors")
    whole = len(getattr(parts.model, "student", parts.model).state_dict())
    words = f"{given}, verified: {loaded} of {whole} tensors" if given else "random"
    inherited = findings.facts.get("inherited")
    return words + (f", {len(inherited)} tensors of the teacher" if inherited else "")


def _images_per_step(cfg: DictConfig) -> Optional[int]:
    batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    return batch * cfg.train.accumulate if isinstance(batch, int) else None


def _numbers(summaries: Sequence[CocoSummary]) -> Dict[str, Any]:
    """The counts of some data sets together, and their classes."""
    names = [f.name for f in fields(summaries[0]) if isinstance(getattr(summaries[0], f.name), int)]
    counts = {n: sum(int(getattr(x, n)) for x in summaries) for n in names if n != "refused"}
    return {
        "files": [x.json_file for x in summaries],
        **counts,
        "classes": len(summaries[0].classes),
    }


def _levels(
    student: nn.Module,
    teacher: Optional[FrozenTeacher],
    stages: Mapping[str, Stage],
    sample: Optional[Mapping[str, Any]],
) -> List[Dict[str, Any]]:
    """A row per tap and stride that either pyramid has and some stage might use."""
    ours, theirs = pyramid_shapes(student), teacher.shapes if teacher is not None else {}
    used = {tap for stage in stages.values() for tap in stage.loss.taps} | {"fpn"}
    rows = []
    for tap in (tap for tap in ours if tap in used):
        for stride in sorted({*ours[tap], *theirs.get(tap, ())}):
            s, t = ours[tap].get(stride), theirs.get(tap, {}).get(stride)
            aligned = {
                name: stage.loss.aligned(stride, s, t)
                for name, stage in stages.items()
                if tap in stage.loss.taps and stride in stage.loss.strides
            }
            size = _map_size(student, teacher, sample, stride)
            row = {"tap": tap, "stride": stride, "student_channels": s, "teacher_channels": t}
            rows.append({**row, "map_size": size, "aligned": aligned})
    return rows


def _map_size(
    student: nn.Module,
    teacher: Optional[FrozenTeacher],
    sample: Optional[Mapping[str, Any]],
    stride: int,
) -> Optional[Tuple[int, int]]:
    """(height, width) of a map of the first image."""
    if not sample:
        return None
    parts = [student] if teacher is None else [student, teacher.model]
    pad = lcm(*(max(x.backbone.size_divisibility, 1) for x in parts))
    height, width = (-(-side // pad) * pad for side in sample["image"].shape[-2:])
    return -(-height // stride), -(-width // stride)


def _stage(name: str, stage: Stage, max_iter: int) -> Dict[str, Any]:
    start, end = stage.span(max_iter)
    ramp = round(stage.ramp * max_iter) if isinstance(stage.ramp, float) else stage.ramp
    return {
        "stage": name,
        "loss": type(stage.loss).__name__,
        "taps": sorted(stage.loss.taps),
        "strides": list(stage.loss.strides or []),
        "weight": stage.weight,
        "relative": stage.relative,
        "start": start,
        "ramp": ramp,
        "end": end,
        "parameters": count_parameters(stage.loss),
    }


# --- warnings -----------------------------------------------------------------------------------


def advise(cfg: DictConfig, parts: Parts, findings: Findings) -> None:
    """Put into ``findings`` a warning of what works, and is probably not meant.

    Args:
        cfg, parts, findings: see :func:`describe`.
    """
    train, warn, model = cfg.train, findings.warn, parts.model
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
    disk = findings.facts.get("disk")
    if disk and disk["free_mb"] < disk["needed_mb"]:
        problem = (
            f"{disk['needed_mb']:.0f} MB of checkpoints on a disk with {disk['free_mb']:.0f} MB"
        )
        fix = "keep fewer by train.checkpointer.max_to_keep, or choose another disk"
        warn("train.output_dir", train.output_dir, problem, fix)
    _advise_precision(cfg, model, findings)
    _advise_optimizer(cfg, parts.optimizer, findings)
    _advise_data(findings)
    if model is not FAILED and losses_of(model):
        _advise_pair(cfg, model, findings)


def _advise_precision(cfg: DictConfig, model: nn.Module, findings: Findings) -> None:
    if torch.device(cfg.train.device).type != "cpu" or has_bfloat16():
        return
    problem = "this CPU has no instructions for bfloat16"
    if cfg.train.amp.enabled and cfg.train.amp.dtype in (None, "bfloat16"):
        fix = "use train.amp.enabled=False"
        findings.warn("train.amp.enabled", True, f"{problem}: about ten times as long", fix)
    teacher = getattr(model, "teacher", None)
    if teacher is not None and teacher.precision == "bfloat16":
        fix = "use model.teacher.precision=float32"
        findings.warn("model.teacher.precision", "bfloat16", f"{problem}: not faster", fix)


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


def _advise_data(findings: Findings) -> None:
    data = findings.facts.get("data", {})
    train, test = ([x for x in data.get(k, []) if x is not FAILED] for k in ("train", "test"))
    for summary in test:
        if summary.json_file in {x.json_file for x in train}:
            problem = "is the training data, too: figures say nothing about other images"
            findings.warn(
                summary.key, summary.json_file, problem, "use images held out of training"
            )


def _advise_pair(cfg: DictConfig, model: nn.Module, findings: Findings) -> None:
    teacher, ours = model.teacher, num_classes(model.student)
    if teacher is not None:
        theirs = num_classes(teacher.model)
        if theirs != ours:
            problem = f"The teacher has {theirs} classes, the student {ours}: the teacher's head is unused"
            fix = "its feature maps are what counts"
            findings.warn("model.teacher.config", teacher.name, problem, fix)
        if not teacher.weights:
            fix = "set it to a trained detector's weights"
            findings.warn("model.teacher.weights", "''", "the teacher is not trained", fix)
    max_iter = cfg.train.max_iter
    for name, stage in model.stages.items():
        key, (start, end) = f"model.stages.{name}", stage.span(max_iter)
        ramp = _stage(name, stage, max_iter)["ramp"]
        if start == end:
            problem = f"never begins within train.max_iter={max_iter}"
            findings.warn(f"{key}.start", stage.start, problem, "start earlier or train longer")
        elif ramp > end - start:
            problem = f"does not reach its full weight: it is on for {end - start} iterations"
            findings.warn(f"{key}.ramp", stage.ramp, problem, "use a shorter ramp")


# --- text ---------------------------------------------------------------------------------------


def as_text(found: Dict[str, Any]) -> str:
    """``found``, what :func:`describe` returns, as text, with what preflight measured, if any."""
    pair = "teacher" in found or bool(found.get("stages"))
    blocks = [_detectors(found, pair)] if "student" in found else []
    if found.get("levels"):
        levels = [
            {
                "tap": x["tap"],
                "stride": x["stride"],
                "student's channels" if pair else "channels": x["student_channels"],
                **({"teacher's": x["teacher_channels"]} if "teacher" in found else {}),
                "map": "x".join(map(str, x["map_size"] or ())),
                **({"made comparable": _aligned(x)} if found["stages"] else {}),
            }
            for x in found["levels"]
        ]
        blocks.append(_table([list(row.values()) for row in levels], list(levels[0])))
    if found.get("stages"):
        rows = [
            [
                x["stage"],
                x["loss"],
                "/".join(x["taps"]),
                f"{x['weight']:g}{' of the loss' if x['relative'] else ''}",
                f"{x['start']} - {x['end']}" if x["end"] else "never",
                x["ramp"],
                f"{x['parameters']:,}",
            ]
            for x in found["stages"]
        ]
        head = ["stage", "loss", "tap", "weight", "iterations", "ramp", "parameters"]
        blocks.append(_table(rows, head))
    if found["data"]:
        hidden = {"files"} if found.get("student", {}).get("masks", True) else {"files", "unmasked"}
        names = list(dict.fromkeys(k for x in found["data"].values() for k in x if k not in hidden))
        rows = [[split, *(x.get(n) for n in names)] for split, x in found["data"].items()]
        blocks.append(_table(rows, ["data", *(n.replace("_", " ") for n in names)]))
    blocks.append("\n".join(_costs(found)))
    return "\n\n".join(x for x in blocks if x)


def _detectors(found: Dict[str, Any], pair: bool) -> str:
    lines = []
    for who in ("student", "teacher") if pair else ("student",):
        x = found.get(who)
        lines.append(
            f"{who if pair else 'model'}: {x['family']}, {x['backbone']}, {x['parameters'] / 1e6:.1f} M parameters, "
            f"{x['classes']} classes; weights: {x['weights']}"
            if x
            else f"{who}: none"
        )
    return "\n".join(lines)


def _aligned(level: Dict[str, Any]) -> str:
    return "; ".join(f"{name}: {how}" for name, how in level["aligned"].items())


def _table(rows: List[List[Any]], head: List[str]) -> str:
    return tabulate(rows, head, tablefmt="simple", missingval="-", disable_numparse=True)


def _costs(found: Dict[str, Any]) -> List[str]:
    lines: List[str] = []
    train = found["data"].get("train")
    if train and found["images_per_step"]:
        epochs = found["max_iter"] * found["images_per_step"] / train["images"]
        lines.append(
            f"length: {found['max_iter']} iterations of {found['images_per_step']} images, "
            f"{epochs:.3g} epochs; the first image is {'x'.join(map(str, found['image_size'] or '?'))}"
        )
    disk = found.get("disk")
    if disk:
        lines.append(
            f"disk: {disk['kept']} checkpoints of {disk['checkpoint_mb']:.0f} MB, "
            f"{disk['needed_mb']:.0f} MB with the one being written; {disk['free_mb']:.0f} MB free"
        )
    measured = found.get("measured")
    if measured:
        seconds, memory = measured["seconds_per_step"], measured["peak_memory_mb"]
        lines.append(in_words(seconds, found["max_iter"], memory, found["device"]))
    return lines
