"""A description of a run before it starts, in numbers and as text."""

import re
from dataclasses import fields
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence

from detectron2.layers import CNNBlockBase
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from sharedkd.config.length import images_per_step
from sharedkd.data.coco import CocoSummary
from sharedkd.data.loader import TrainLoader
from sharedkd.errors import FAILED
from sharedkd.modeling.detectors import count_parameters, num_classes
from sharedkd.modeling.meta_arch import SharedKD, of_students
from sharedkd.modeling.preparation import size_divisibility
from sharedkd.modeling.stages import Stage, iterations
from sharedkd.modeling.taps import pyramid_shapes
from sharedkd.modeling.teachers import Teacher

from .hooks.cost import in_words
from .parts import Parts

__all__ = ["as_text", "describe"]


def describe(parts: Parts) -> Dict[str, Any]:
    """Describe a run.

    Returns:
        For JSON, without what is unknown: ``output_dir``, ``device``, ``max_iter``, ``images_per_step``
        (of all processes), ``image_size`` (height and width of the student's first image), ``processes``,
        ``data`` (train and test -> counts) and ``disk`` (see :func:`~.folder.check_disk`); of a model that
        could be built also

        * ``student``, ``teacher`` and, by name, the further ``teachers``: architecture (``family``),
          ``backbone``, ``parameters``, ``classes``, ``masks`` (whether it predicts them), ``weights``
          (where they come from) and ``name`` (a teacher's config); of a teacher that is no detector
          with weights, ``about`` and ``name``;
        * ``levels``, one for each tap and stride: channels of all these, ``map_size`` (of the first
          image), and ``aligned``: stage -> how it makes the maps comparable;
        * ``stages``, with their schedules in iterations; ``end`` is the first one that no longer uses
          the stage, 0 if none does.
    """
    cfg, model = parts.cfg, parts.model
    data = {split: [x for x in getattr(parts.data, split) if x] for split in ("train", "test")}
    found = {
        "output_dir": cfg.train.output_dir,
        "device": cfg.train.device,
        "max_iter": cfg.train.max_iter,
        "images_per_step": images_per_step(cfg),
        "image_size": tuple(parts.sample["image"].shape[-2:]) if parts.sample else None,
        "processes": comm.get_world_size(),
        "data": {split: _numbers(summaries) for split, summaries in data.items() if summaries},
        "teachers": {},
        "levels": [],
        "stages": [],
    }
    if parts.disk is not None:
        found["disk"] = parts.disk
    if model is FAILED:
        return found
    found["student"] = _detector(parts.student, _student_weights(parts))
    sources = getattr(model, "sources", {})
    for name, teacher in sources.items():
        group, key = (found, "teacher") if name is None else (found["teachers"], name)
        group[key] = _teacher(teacher)
    found["levels"] = _levels(parts, sources)
    if isinstance(parts.loader, TrainLoader) and parts.loader.unlabelled:
        found["unlabelled"] = {
            "images": parts.loader.unlabelled,
            "images_per_step": parts.loader.unlabelled_batch_size * cfg.train.accumulate,
            "stages": getattr(model, "unlabelled_stages", []),
        }
    every = of_students(model, "stages").items()
    found["stages"] = [_stage(name, x, cfg.train.max_iter) for name, x in every]
    return found


def _detector(model: nn.Module, weights: str, name: str = "") -> Dict[str, Any]:
    return {
        "family": _family(model),
        "backbone": _backbone(model),
        "parameters": count_parameters(model),
        "classes": num_classes(model),
        "masks": bool(getattr(getattr(model, "roi_heads", None), "mask_on", False)),
        "weights": weights,
        "name": name,
    }


def _teacher(teacher: Teacher) -> Dict[str, Any]:
    """Describe a teacher; only a detector with weights has all values."""
    name = getattr(teacher, "name", type(teacher).__name__)
    weights = getattr(teacher, "weights", None)
    if teacher.detector is None or weights is None:
        return {"about": teacher.about, "name": name}
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
    words = given or "random"
    if given and parts.loaded:
        words += f", verified: {len(parts.loaded.names)} of {of} tensors"
    return words + (f", {len(parts.inherited)} tensors of the teacher" if parts.inherited else "")


def _numbers(summaries: Sequence[CocoSummary]) -> Dict[str, Any]:
    """The summed counts of data sets, and their classes."""
    names = [f.name for f in fields(CocoSummary) if f.type is int]
    return {
        "files": [x.json_file for x in summaries],
        **{name: sum(getattr(x, name) for x in summaries) for name in names},
        "classes": len(summaries[0].classes),
    }


def _levels(parts: Parts, teachers: Mapping[Optional[str], Teacher]) -> List[Dict[str, Any]]:
    """One row per tap and stride that a pyramid has and a stage may use."""
    stages = parts.model.stages if isinstance(parts.model, SharedKD) else {}
    ours = pyramid_shapes(parts.student, getattr(parts.model, "pyramid", None))
    used = {tap for stage in stages.values() for tap in stage.loss.taps} | {"fpn"}
    pad = max(size_divisibility(parts.student), 1)
    image = parts.sample["image"].shape[-2:] if parts.sample else ()
    size = [-(-side // pad) * pad for side in image]
    rows = []
    for tap in (tap for tap in ours if tap in used):
        theirs = {name: teacher.shapes.get(tap, {}) for name, teacher in teachers.items()}
        for stride in sorted({*ours[tap]}.union(*theirs.values())):
            channels = {name: shapes.get(stride) for name, shapes in theirs.items()}
            aligned = {
                name: stage.loss.aligned(stride, ours[tap].get(stride), channels.get(stage.teacher))
                for name, stage in stages.items()
                if tap in stage.loss.taps and stride in stage.loss.strides
            }
            row = {
                "tap": tap,
                "stride": stride,
                "student_channels": ours[tap].get(stride),
                "teacher_channels": channels.pop(None, None),
                "teachers": channels,
                "map_size": tuple(-(-side // stride) for side in size) or None,
                "aligned": aligned,
            }
            rows.append(row)
    return rows


def _stage(name: str, stage: Stage, max_iter: int) -> Dict[str, Any]:
    start, end = stage.span(max_iter)
    return {
        "stage": name,
        "loss": type(stage.loss).__name__,
        "teacher": stage.teacher,
        "taps": sorted(stage.loss.taps),
        "strides": list(stage.loss.strides or []),
        "weight": str(stage).removeprefix("weight "),
        "start": start,
        "ramp": iterations(stage.ramp, max_iter),
        "decay": iterations(stage.decay, max_iter),
        "end": end,
        "parameters": count_parameters(stage.loss),
    }


# --- text ---------------------------------------------------------------------------------------


def as_text(found: Mapping[str, Any]) -> str:
    """What :func:`describe` found as text; ``measured`` in it, too, see :mod:`sharedkd.lab.preflight`."""
    blocks = [
        "\n".join(_detectors(found)),
        _table(_level_row(found, x) for x in found["levels"]),
        _table(_stage_row(found, x) for x in found["stages"]),
        _table(_data_row(found, split, x) for split, x in found["data"].items()),
        "\n".join(_costs(found)),
    ]
    return "\n\n".join(filter(None, blocks))


def _is_pair(found: Mapping[str, Any]) -> bool:
    return bool("teacher" in found or found["teachers"] or found["stages"])


def _detectors(found: Mapping[str, Any]) -> Iterator[str]:
    if "student" not in found:
        return
    detectors = {"student" if _is_pair(found) else "model": found["student"]}
    if "teacher" in found or found["stages"] and not found["teachers"]:
        detectors["teacher"] = found.get("teacher")
    detectors.update({f"teacher {name}": x for name, x in found["teachers"].items()})
    words = "{}: {family}, {backbone}, {:.1f} M parameters, {classes} classes; weights: {weights}"
    for who, x in detectors.items():
        if not x or "about" in x:
            yield f"{who}: {x['about'] if x else 'none'}"
        else:
            yield words.format(who, x["parameters"] / 1e6, **x)
    if "teacher" in found and not found["stages"]:
        yield "no distillation loss"


def _level_row(found: Mapping[str, Any], x: Mapping[str, Any]) -> Dict[str, Any]:
    row = {"tap": x["tap"], "stride": x["stride"]}
    row["student's channels" if _is_pair(found) else "channels"] = x["student_channels"]
    if "teacher" in found:
        row["teacher's"] = x["teacher_channels"]
    row.update({f"{name}'s": channels for name, channels in x["teachers"].items()})
    row["map"] = "x".join(map(str, x["map_size"] or ()))
    if found["stages"]:
        row["made comparable"] = "; ".join(f"{name}: {how}" for name, how in x["aligned"].items())
    return row


def _stage_row(found: Mapping[str, Any], x: Mapping[str, Any]) -> Dict[str, Any]:
    return {
        "stage": x["stage"],
        "loss": x["loss"],
        **({"teacher": x["teacher"]} if found["teachers"] else {}),
        "tap": "/".join(x["taps"]),
        "weight": x["weight"],
        "iterations": f"{x['start']} - {x['end']}" if x["end"] else "never",
        "ramp": x["ramp"],
        "decay": x["decay"],
        "parameters": f"{x['parameters']:,}",
    }


def _data_row(found: Mapping[str, Any], split: str, x: Mapping[str, Any]) -> Dict[str, Any]:
    masks = found.get("student", {"masks": True})["masks"]
    hidden = {"files"} if masks else {"files", "unmasked"}
    return {"data": split, **{k.replace("_", " "): v for k, v in x.items() if k not in hidden}}


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows with the same keys, which are the headings."""
    rows = list(rows)
    if not rows:
        return ""
    return tabulate(rows, "keys", tablefmt="simple", missingval="-", disable_numparse=True)


def _costs(found: Mapping[str, Any]) -> Iterator[str]:
    steps, images = found["max_iter"], found["images_per_step"]
    train, disk, measured = found["data"].get("train"), found.get("disk"), found.get("measured")
    if train and images:
        yield (
            f"length: {steps} iterations of {images} images, {steps * images / train['images']:.3g} "
            f"epochs; the first image is {'x'.join(map(str, found['image_size'] or '?'))}"
        )
    if "unlabelled" in found:
        x = found["unlabelled"]
        yield (
            f"images without labels: {x['images']}, {x['images_per_step']} more in each iteration, "
            f"{steps * x['images_per_step'] / x['images']:.3g} epochs; "
            f"for the stages {', '.join(x['stages'])}"
        )
    if disk:
        yield (
            f"disk: {disk['kept']} checkpoints of {disk['checkpoint_mb']:.0f} MB, "
            f"{disk['needed_mb']:.0f} MB with the one being written; {disk['free_mb']:.0f} MB free"
        )
    if measured:
        seconds, memory = measured["seconds_per_step"], measured["peak_memory_mb"]
        yield in_words(seconds, steps, memory, found["device"])
