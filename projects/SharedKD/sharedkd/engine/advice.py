"""Warnings about settings of a run that work but are probably a mistake."""

from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

import torch
from detectron2.layers import FrozenBatchNorm2d
from omegaconf import OmegaConf
from torch import nn

from sharedkd.config.classic import is_classic
from sharedkd.config.length import images_per_step
from sharedkd.data.loader import TrainLoader
from sharedkd.errors import ConfigError
from sharedkd.modeling.detectors import count_parameters, num_classes
from sharedkd.modeling.hardware import has_bfloat16
from sharedkd.modeling.meta_arch import SharedKD, of_students
from sharedkd.modeling.stages import iterations
from sharedkd.modeling.teachers import FrozenTeacher, teacher_key
from sharedkd.weights.conventions import convention_of_model

from .checks import key_of
from .hooks.outgrown import ap_of
from .hooks.record import read_record
from .parts import Parts

__all__ = ["advise"]

#: Detectron2's own schedules: SGD with 0.02 for 16 images.  Twice as much per image is suspicious.
SGD_LR_PER_IMAGE, SUSPICIOUS = 0.02 / 16, 2.0
#: About how much slower bfloat16 is than float32 on a CPU without instructions for it.
BFLOAT16_SLOWDOWN = 10
#: Where a classic yaml has what prepares the images of a backbone.
CLASSIC_KEYS = {
    "input_format": "INPUT.FORMAT",
    "pixel_mean": "MODEL.PIXEL_MEAN",
    "pixel_std": "MODEL.PIXEL_STD",
    "stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
}


def advise(parts: Parts) -> List[ConfigError]:
    """Return the warnings for a run.  What could not be built is not checked."""
    checks = (
        _weights,
        _evaluation,
        _checkpoints,
        _disk,
        _precision,
        _optimizer,
        _data,
        _unlabelled,
    )
    found = [warning for check in checks for warning in check(parts)]
    if isinstance(parts.model, SharedKD):
        found += [*_teachers(parts), *_stages(parts)]
    return found


def _weights(parts: Parts) -> Iterator[ConfigError]:
    model = parts.cfg.model
    if not parts.resuming:
        given = parts.cfg.train.init_checkpoint
        yield from _random("train", given, parts.student, key_of(model, "stages"))
        if parts.teachers and not given and not of_students(parts.model, "stages"):
            problem = "a start without a loss gives little to a student from random weights"
            yield ConfigError("model.stages", "", problem, "use --method shared_kd")
        for name, x in parts.peers.items():
            key = f"model.peers.{name}"
            stages = key_of(model.peers[name], "stages", key)
            yield from _random(key, x.init_checkpoint, x.student, stages)
    if parts.loaded:
        yield from _convention(parts)


def _random(group: str, given: str, student: nn.Module, stages: str) -> Iterator[ConfigError]:
    """A student without initial weights; ``stages`` is the key of its ResNet's stages, if it has one."""
    if given:
        return
    problem = "the student starts from random weights"
    fix = "set it to an ImageNet backbone or a detector if there is one"
    if stages and any(isinstance(x, FrozenBatchNorm2d) for x in student.modules()):
        problem += ", whose frozen norms never learn"
        fix += f"; else use {stages}.norm=BN"
    yield ConfigError(f"{group}.init_checkpoint", "''", problem, fix)


def _convention(parts: Parts) -> Iterator[ConfigError]:
    """Initial weights that were trained on images of another order or normalisation."""
    cfg, images = parts.cfg, "dataloader.train.mapper.image_format"
    theirs = parts.loaded.convention
    ours = convention_of_model(parts.student, OmegaConf.select(cfg, images))
    fields = theirs.differences(ours)
    if not fields:
        return
    words = {
        "order": lambda x: f"{x.order} images",
        "std": lambda x: f"pixel_std {_listed(x.std)}",
        "stride_in_1x1": lambda x: (
            f"the stride in the {'1x1' if x.stride_in_1x1 else '3x3'} convolution"
        ),
    }
    has, wants = (", ".join(words[field](x) for field in fields) for x in (theirs, ours))

    def place(name: str) -> str:
        return CLASSIC_KEYS[name] if is_classic(cfg) else key_of(cfg.model, name)

    values: Dict[str, Any] = {}
    if "order" in fields:
        values[place("input_format")] = theirs.order
        if not is_classic(cfg):
            values[images] = theirs.order
    for name in ("mean", "std") if {"order", "std"} & {*fields} else ():
        numbers = getattr(theirs, name)
        if numbers:
            values[place(f"pixel_{name}") or f"pixel_{name}"] = _listed(numbers)
    if "stride_in_1x1" in fields:
        values[place("stride_in_1x1") or "stride_in_1x1"] = theirs.stride_in_1x1
    settings = " ".join(f"{key}={value}" for key, value in values.items() if key)
    yield ConfigError(
        "train.init_checkpoint",
        cfg.train.init_checkpoint,
        f"follows {theirs.maker} convention ({has}), not this model's ({wants}): it computes other "
        "features here than it has learnt",
        f"set {settings}, or use weights of the model's convention",
    )


def _listed(values: Sequence[float]) -> str:
    return "[" + ",".join(f"{x:.6g}" for x in values) + "]"


def _evaluation(parts: Parts) -> Iterator[ConfigError]:
    if parts.cfg.dataloader.get("evaluator") is None:
        fix = "set it to a DatasetEvaluator"
        yield ConfigError("dataloader.evaluator", None, "nothing is evaluated", fix)
    elif parts.cfg.train.eval_period == 0:
        problem = "the student is evaluated only at the end"
        fix = "set a number of iterations to follow the run"
        yield ConfigError("train.eval_period", 0, problem, fix)


def _checkpoints(parts: Parts) -> Iterator[ConfigError]:
    train = parts.cfg.train
    if train.checkpointer.period > train.max_iter and not train.fast_dev_run:
        problem = f"there is no checkpoint before the end at {train.max_iter}"
        fix = "set fewer iterations: an interrupted run without one starts again at iteration 0"
        yield ConfigError("train.checkpointer.period", train.checkpointer.period, problem, fix)


def _disk(parts: Parts) -> Iterator[ConfigError]:
    disk = parts.disk
    if disk and disk["free_mb"] < disk["needed_mb"]:
        need, free = f"{disk['needed_mb']:.0f} MB", f"{disk['free_mb']:.0f} MB"
        problem = f"{need} of checkpoints on a disk with {free}"
        fix = "keep fewer by train.checkpointer.max_to_keep, or choose another disk"
        yield ConfigError("train.output_dir", parts.cfg.train.output_dir, problem, fix)


def _precision(parts: Parts) -> Iterator[ConfigError]:
    train = parts.cfg.train
    if torch.device(train.device).type != "cpu" or has_bfloat16():
        return
    problem = "this CPU has no instructions for bfloat16: "
    problem += f"about {BFLOAT16_SLOWDOWN} times as slow as float32"
    if train.amp.enabled and train.amp.dtype in (None, "bfloat16"):
        yield ConfigError("train.amp.enabled", True, problem, "use train.amp.enabled=False")
    for name, teacher in parts.teachers.items():
        if getattr(teacher, "precision", None) == "bfloat16":
            key = f"{teacher_key(name)}.precision"
            yield ConfigError(key, "bfloat16", problem, f"use {key}=float32")


def _optimizer(parts: Parts) -> Iterator[ConfigError]:
    if not parts.optimizer:
        return
    lr = max(group["lr"] for group in parts.optimizer.param_groups)
    images = images_per_step(parts.cfg)
    if lr == 0:
        yield ConfigError("optimizer.lr", lr, "nothing is learnt", "use a value above 0")
    elif isinstance(parts.optimizer, torch.optim.SGD) and images:
        usual = SGD_LR_PER_IMAGE * images
        if lr > SUSPICIOUS * usual:
            problem = f"is high for SGD with {images} images a step; Detectron2's own schedules "
            problem += f"scale to {usual:.2g}"
            yield ConfigError("optimizer.lr", lr, problem, f"use {usual:.2g} or so")


def _data(parts: Parts) -> Iterator[ConfigError]:
    trained = {x.json_file for x in parts.data.usable("train")}
    for summary in parts.data.usable("test"):
        if summary.json_file in trained:
            problem = "is also the training data: the results say nothing about other images"
            fix = "use images held out of training"
            yield ConfigError(summary.key, summary.json_file, problem, fix)


def _unlabelled(parts: Parts) -> Iterator[ConfigError]:
    loader = parts.loader
    if isinstance(loader, TrainLoader) and loader.unlabelled:
        count = loader.unlabelled_ratio * loader.total_batch_size
        if abs(count - loader.unlabelled_batch_size) > 1e-3:
            own = OmegaConf.select(parts.cfg, "data.unlabelled_images") is not None
            problem = f"is {count:g} images a batch: {loader.unlabelled_batch_size} are taken"
            fix = (
                f"use {loader.unlabelled_batch_size / loader.total_batch_size:g}, or another batch"
            )
            key = "data.unlabelled_ratio" if own else "dataloader.train.unlabelled_ratio"
            yield ConfigError(key, loader.unlabelled_ratio, problem, fix)


def _teachers(parts: Parts) -> Iterator[ConfigError]:
    ours = num_classes(parts.student)
    for name, teacher in parts.teachers.items():
        key, weights = teacher_key(name), getattr(teacher, "weights", None)
        theirs = None if teacher.detector is None else num_classes(teacher.detector)
        if theirs not in (None, ours):
            problem = f"The teacher has {theirs} classes, the student {ours}: "
            problem += "only what knows no classes is copied and compared"
            value = getattr(teacher, "name", type(teacher).__name__)
            fix = "change nothing if its classes are to be others"
            yield ConfigError(f"{key}.config", value, problem, fix)
        scale = getattr(teacher, "scale", 1)
        if scale != 1 and parts.sample and "larger_image" not in parts.sample:
            problem = "the teacher sees the student's image enlarged, with nothing more to see"
            fix = "resize after all other augmentations but crops and flips, with the config's own mapper"
            yield ConfigError(f"{key}.scale", scale, problem, fix)
        if weights:
            yield from _weaker(parts, f"{key}.weights", weights)
        if weights == "" and isinstance(teacher, FrozenTeacher):  # another kind may load its own
            fix = "set it to a trained detector's weights"
            yield ConfigError(f"{key}.weights", "''", "the teacher is not trained", fix)


def _weaker(parts: Parts, key: str, weights: str) -> Iterator[ConfigError]:
    """A teacher's run whose AP is below that of a plain student's finished run beside this one."""
    theirs, size = Path(weights).absolute().parent, count_parameters(parts.student)
    ap = _results(_record(theirs))
    for folder in sorted(Path(parts.cfg.train.output_dir).absolute().parent.glob("*/")):
        record = _record(folder)
        alone = record.get("stages") == [] and not record.get("inherited")
        plain = alone and record["parameters"]["student"] == size
        higher = _results(record) if plain and folder != theirs else {}
        worse = sorted(x for x in ap.keys() & higher.keys() if ap[x] < higher[x])
        if worse:
            figures = ", ".join(f"{x[0]} {ap[x]:.1f}, not {higher[x]:.1f}" for x in worse)
            problem = f"has less AP than the plain run {folder.name} beside this one: {figures}"
            fix = "train the teacher longer or on larger images, or train without it"
            yield ConfigError(key, weights, problem, fix)


def _record(folder: Path) -> Dict[str, Any]:
    try:
        return read_record(folder)
    except ConfigError:  # another run's, damaged
        return {}


def _results(record: Mapping[str, Any]) -> Dict[Tuple[str, str], float]:
    """(task, validation data) -> AP of a finished run; empty if it is none."""
    data = record.get("validation")
    return {(task, data): ap for task, ap in ap_of(record.get("results") or {}).items() if data}


def _stages(parts: Parts) -> Iterator[ConfigError]:
    max_iter = parts.cfg.train.max_iter
    stages = {
        f"{pair.key}.stages.{name}": stage
        for pair in parts.model.pairs.values()
        for name, stage in pair.stages.items()
    }
    for key, stage in stages.items():
        start, end = stage.span(max_iter)
        ramp, decay = (iterations(x, max_iter) for x in (stage.ramp, stage.decay))
        if stage.full == 0:
            continue  # off, as its config says
        if start == end:
            problem = f"never begins within train.max_iter={max_iter}"
            fix = "start earlier or train longer"
            yield ConfigError(f"{key}.start", stage.start, problem, fix)
        elif max(ramp, 1) + max(decay, 1) - 1 > end - start:
            problem = f"does not reach its full weight: it is on for {end - start} iterations"
            time, value = ("ramp", stage.ramp) if ramp else ("decay", stage.decay)
            yield ConfigError(f"{key}.{time}", value, problem, f"use a shorter {time}")
