"""From a config and a checkpoint to checked files with their descriptions."""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from functools import partial
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from sharedkd.config import student_only
from sharedkd.config.build import construct
from sharedkd.config.own_data import class_names
from sharedkd.engine.hooks.record import hardware, versions
from sharedkd.errors import ConfigError, ConfigErrors
from sharedkd.files import replace
from sharedkd.lab.analysis.models import trained_student
from sharedkd.lab.tables import markdown
from sharedkd.lab.timing import spread, take_turns
from sharedkd.modeling.detectors import num_classes, weights_of
from sharedkd.modeling.teachers.frozen import FrozenTeacher
from sharedkd.weights.loading import fingerprint

from .agreement import TOLERANCES, UNMATCHED, Agreement
from .formats import FORMATS, UNSUPPORTED, NotExportable, Runner, detect, outputs_of
from .images import Images, fit, read_images

__all__ = ["export_student", "megabytes", "table"]

KEY = "train.init_checkpoint"
WARM_UP = 3  # runs that are not counted: TorchScript compiles in its first ones


def export_student(
    cfg: DictConfig,
    formats: Sequence[str],
    output: str,
    files: Sequence[str] = (),
    size: Optional[Tuple[int, int]] = None,
    rounds: int = 10,
) -> Dict[str, Any]:
    """Export the student of ``cfg``, with the weights of ``train.init_checkpoint``, on the CPU.

    A file appears in ``output`` when it has been loaded again and agrees with the eager student on
    real images; beside it lies ``<file>.json``, which says all that its use needs.

    Args:
        cfg: of :func:`~sharedkd.config.load.load_config`; of a pair, the student is exported.
        formats: names in :data:`FORMATS`.
        files: images; none: some of the config's validation set.
        size: (H, W) of the timed image; None: the largest of the images is timed.
        rounds: timed runs of each arm; 0: none.

    Returns:
        For JSON: ``models``, of ``student`` (eager), each format, perhaps ``teacher``: ``megabytes``,
        ``milliseconds`` (median, least and greatest on one image), of a file also its ``path`` and
        :class:`Agreement`; ``image`` (its height and width), ``hardware``, ``versions``; ``no_teacher``:
        why there is none; ``refused``: a line for each format that refuses the student.

    Raises:
        ConfigError: before anything is written.
    """
    _check_formats(formats)
    if not cfg.train.init_checkpoint:
        problem = "is empty, there is nothing to export"
        raise ConfigError(KEY, "''", problem, "use --weights CHECKPOINT")
    student = trained_student(cfg, cfg.train.init_checkpoint, KEY).requires_grad_(False)
    images = read_images(student_only(cfg), files)
    example = _example(student, images)
    checked = [*images.tensors, *images.corner_cases(example)]
    eager = [(image, detect(student, image)) for image in checked]
    about = _describe(cfg, student, images)
    models: Dict[str, Dict[str, Any]] = {"student": {"megabytes": megabytes(student)}}
    os.makedirs(output, exist_ok=True)
    runners: Dict[str, Callable[[Tensor], Any]] = {"student": partial(detect, student)}
    result: Dict[str, Any] = {"models": models, "refused": []}
    for name in formats:
        try:
            exported = _export(name, student, example, eager, about, output)
            runners[name], models[name] = exported
        except NotExportable as e:
            result["refused"].append(str(ConfigError("--format", name, str(e), e.fix)))
    largest = max(images.tensors, key=torch.numel)
    image = fit(example, size, images.fill) if size else largest
    if rounds:
        try:
            teacher = _teacher(cfg)
            flips = teacher.input_format != images.about["channels"]
            runners["teacher"] = lambda x: detect(teacher.model, x.flip(0) if flips else x)
            runners["teacher"](image)
            models["teacher"] = {"megabytes": megabytes(teacher.model)}
        except (ConfigError, NotExportable) as e:
            runners.pop("teacher", None)
            result["no_teacher"] = str(e)
        arms = {name: partial(runner, image) for name, runner in runners.items()}
        for name, seconds in take_turns(arms, rounds, WARM_UP).items():
            models[name]["milliseconds"] = spread([1e3 * x for x in seconds])
    facts = {"hardware": hardware(torch.device("cpu")), "versions": versions()}
    return {**result, "image": list(image.shape[-2:]), **facts}


def table(result: Mapping[str, Any]) -> str:
    """What :func:`export_student` returned, as a table of size, latency and agreement."""
    rows, files = [], []
    for name, model in result["models"].items():
        spent = model.get("milliseconds")
        row = [name, f"{model['megabytes']:.1f}"]
        row.append("{median:.1f} ({low:.1f} to {high:.1f})".format(**spent) if spent else "-")
        if "path" in model:
            files.append(model)
            largest = [
                f"{key} {x:.1e}{' px' * (key == 'boxes')}" for key, x in model["largest"].items()
            ]
            row += [f"{model['unmatched']} of {model['detections']}", ", ".join(largest)]
        rows.append([*row, "-", "-"][:5])
    header = ["model", "MB", "ms (least to greatest)", "detections without a partner"]
    height, width = result["image"]
    lines = [markdown(rows, [*header, "largest difference"]), ""]
    lines.append(f"One image of {height} x {width}, {result['hardware']}.")
    for x in files[:1]:  # all files are checked on the same images
        lines.append(f"Checked on {x['images']} images, {x['empty']} of them without detections.")
    if "no_teacher" in result:
        lines.append(f"Teacher not measured: {result['no_teacher']}")
    return "\n".join([*lines, *(f"{x['path']} and {x['path']}.json" for x in files)])


def _check_formats(names: Sequence[str]) -> None:
    errors = []
    for name in names:
        if name in UNSUPPORTED:
            errors.append(ConfigError("--format", name, *UNSUPPORTED[name]))
        elif name not in FORMATS:
            fix = f"use any of {', '.join(FORMATS)}"
            errors.append(ConfigError("--format", name, "no such format", fix))
        elif FORMATS[name].missing():
            missing = " and ".join(FORMATS[name].missing())
            fix = f"pip install {' '.join(FORMATS[name].packages)}"
            errors.append(ConfigError("--format", name, f"{missing} is not installed", fix))
    if errors:
        raise ConfigErrors(errors)


def _example(student: nn.Module, images: Images) -> Tensor:
    """The image with the most detections: tracing follows it through the model."""
    try:
        counts = [len(detect(student, image)[0]) for image in images.tensors]
    except NotExportable as e:
        fix = "export a detector of instances"
        raise ConfigError("model", type(student).__name__, str(e), fix) from e
    if not max(counts):
        problem = "the student detects nothing in them, so that nothing could be compared"
        fix = "name images with objects, or train the student for longer"
        raise ConfigError("--images", ", ".join(images.names), problem, fix)
    return images.tensors[counts.index(max(counts))]


def _export(
    name: str,
    student: nn.Module,
    example: Tensor,
    eager: Sequence[Tuple[Tensor, Sequence[Tensor]]],
    about: Mapping[str, Any],
    output: str,
) -> Tuple[Runner, Dict[str, Any]]:
    """Convert, load, compare; then, and only then, put the files in their place."""
    to = FORMATS[name]
    path = os.path.join(output, f"student.{to.suffix}")
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=output) as folder:
        unfinished = os.path.join(folder, os.path.basename(path))
        to.convert(student, example, unfinished)
        runner = to.load(unfinished)
        agreement = Agreement()
        for image, expected in eager:
            found = _run(runner, image)
            agreement.add(outputs_of(student), expected, found, image.shape[-2:])
        if not agreement.holds:
            raise NotExportable(
                f"the file was dropped: {agreement.unmatched} detections differ from the eager "
                f"student's {agreement.detections} by more than {TOLERANCES}",
                "use another format",
            )
        sidecar = {
            "file": os.path.basename(path),
            "format": name,
            "runs_with": to.runs_with,
            **about,
            "agreement": {**asdict(agreement), "tolerances": TOLERANCES, "may_differ": UNMATCHED},
        }
        replace(f"{path}.json", lambda f: f.write(json.dumps(sidecar, indent=1).encode()))
        with open(unfinished, "rb") as source:
            replace(path, lambda f: shutil.copyfileobj(source, f))
    size = {"path": path, "megabytes": os.path.getsize(path) / 2**20}
    return runner, {**size, **asdict(agreement)}


def _run(runner: Runner, image: Tensor) -> Sequence[Tensor]:
    try:
        return runner(image)
    except Exception as e:  # whatever it runs on
        reason = str(e).strip().splitlines()[-1:] or [type(e).__name__]
        shape = "x".join(map(str, image.shape[-2:]))
        raise NotExportable(f"the file fails on an image of {shape}: {reason[0]}") from e


def _describe(cfg: DictConfig, student: nn.Module, images: Images) -> Dict[str, Any]:
    """The description that a program without this package needs to run the file."""
    names, count = class_names(cfg) or [], num_classes(student) or 0
    return {
        "inputs": {"image": {"shape": [3, "H", "W"], "dtype": "uint8", **images.about}},
        "in_graph": {
            "pixel_mean": student.pixel_mean.flatten().tolist(),
            "pixel_std": student.pixel_std.flatten().tolist(),
            "padding_to_a_multiple_of": student.backbone.size_divisibility,
        },
        "outputs": outputs_of(student),
        "order": "descending score",
        "classes": names if len(names) == count else list(map(str, range(count))),
        "device": "cpu",
        "checkpoint": {
            "file": os.path.basename(cfg.train.init_checkpoint),
            "fingerprint": fingerprint(student),
        },
        "versions": versions(),
    }


def _teacher(cfg: DictConfig) -> FrozenTeacher:
    """The teacher; a ConfigError if its weights are not on this disk, or do not fit."""
    node = cfg.model.get("teacher") or {}
    weights = node.get("weights") or weights_of(str(node.get("config")))
    if not weights or not os.path.isfile(weights):
        raise ConfigError("model.teacher.weights", weights, "no such file", "name it, to time it")
    return construct(node, "model.teacher")


def megabytes(model: nn.Module) -> float:
    """The size of a model's parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in model.state_dict().values()) / 2**20
