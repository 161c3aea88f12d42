"""From a config and a checkpoint to checked files with their descriptions."""

import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from sharedkd.config import student_only
from sharedkd.config.build import construct
from sharedkd.engine.hooks.record import hardware, versions
from sharedkd.errors import ConfigError, Findings
from sharedkd.files import replace
from sharedkd.modeling.detectors import num_classes
from sharedkd.modeling.teachers.frozen import FrozenTeacher
from sharedkd.weights.loading import fingerprint, load_trained

from .agreement import TOLERANCES, UNMATCHED, Agreement, compare
from .formats import FORMATS, Format, NotExportable, Runner, detect, outputs_of
from .images import Images, fit, read_images

__all__ = ["Export", "export_student"]

WARM_UP = 3  # runs that are not counted: TorchScript compiles in its first ones


@dataclass
class Export:
    """What an export has come to.

    Args:
        files: format -> path, megabytes, and :class:`Agreement`'s fields.
        milliseconds: ``student`` (eager), each format, perhaps ``teacher`` -> median, least and
            greatest, on the same image.
        megabytes: of the weights of ``student`` and ``teacher``, and of each file.
        about: image size, hardware, versions, and why there is no teacher.
        refused: what could not be exported.
    """

    files: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    milliseconds: Dict[str, Dict[str, float]] = field(default_factory=dict)
    megabytes: Dict[str, float] = field(default_factory=dict)
    about: Dict[str, Any] = field(default_factory=dict)
    refused: Findings = field(default_factory=Findings)

    def as_json(self) -> Dict[str, Any]:
        refused = [str(e) for e in self.refused.errors]
        return {**{k: v for k, v in vars(self).items() if k != "refused"}, "refused": refused}


def export_student(
    cfg: DictConfig,
    formats: Sequence[str],
    output: str,
    files: Sequence[str] = (),
    size: Optional[Tuple[int, int]] = None,
    rounds: int = 10,
) -> Export:
    """Export the student of ``cfg``, with the weights of ``train.init_checkpoint``, on the CPU.

    A file appears in ``output`` when it has been loaded again and agrees with the eager student on
    real images; beside it lies ``<file>.json``, which says all that its use needs.

    Args:
        cfg: of :func:`~sharedkd.config.load.load_config`; of a pair, the student is taken.
        formats: names in :data:`FORMATS`.
        files: images; none: some of the config's validation set.
        size: (H, W) for formats with a fixed size; None: that of the largest of the images.
        rounds: runs of each arm whose latency is measured; 0: none.

    Raises:
        ConfigError: before anything is written.  What a format refuses is in the result instead.
    """
    result = Export()
    _check_formats(formats)
    student = load_student(cfg)
    images = read_images(student_only(cfg), files)
    example = _example(student, images)
    if size is None:
        size = images.common_size(max(student.backbone.size_divisibility, 1))
    images = images.with_corner_cases(example)
    about = _describe(cfg, student, images)
    os.makedirs(output, exist_ok=True)
    runners: Dict[str, Runner] = {}
    for name in formats:
        runners.update(
            result.refused.step(
                _export, FORMATS[name], student, example, images, size, about, output, result
            )
            or {}
        )
    image = fit(example, size, images.fill)
    if rounds:
        _measure(result, cfg, student, runners, image, images.input_format, rounds)
    result.megabytes["student"] = _megabytes(student)
    result.about.update(
        image=list(image.shape[-2:]),
        hardware=hardware(torch.device("cpu")),
        versions=versions(),
    )
    return result


def _check_formats(names: Sequence[str]) -> None:
    findings = Findings()
    for name in names:
        if name not in FORMATS:
            known = ", ".join(FORMATS)
            findings.add(ConfigError("--format", name, "no such format", f"use any of {known}"))
        elif FORMATS[name].missing():
            missing = " and ".join(FORMATS[name].missing())
            fix = f"pip install {' '.join(FORMATS[name].packages)}"
            findings.add(ConfigError("--format", name, f"{missing} is not installed", fix))
    findings.raise_errors()


def load_student(cfg: DictConfig) -> nn.Module:
    """The trained student alone, in eval mode on the CPU.  No teacher is built.

    Raises:
        ConfigError: no checkpoint, or one that does not fill the student exactly.
    """
    key = "train.init_checkpoint"
    if not cfg.train.init_checkpoint:
        raise ConfigError(
            key, "''", "is empty, there is nothing to export", "use --weights CHECKPOINT"
        )
    student = construct(student_only(cfg).model, "model")
    load_trained(student, cfg.train.init_checkpoint, key)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    return student.eval()


def _example(student: nn.Module, images: Images) -> Tensor:
    """The image with the most detections: what is traced on it takes part in the graph."""
    try:
        counts = [len(detect(student, image)[0]) for image in images.tensors]
    except NotExportable as e:
        raise ConfigError(
            "model", type(student).__name__, str(e), "export a detector of instances"
        ) from e
    if not max(counts):
        raise ConfigError(
            "--images",
            ", ".join(images.names),
            "the student detects nothing in them, so that nothing could be compared",
            "name images with objects, or train the student for longer",
        )
    return images.tensors[counts.index(max(counts))]


def _export(
    to: Format,
    student: nn.Module,
    example: Tensor,
    images: Images,
    size: Tuple[int, int],
    about: Mapping[str, Any],
    output: str,
    result: Export,
) -> Dict[str, Runner]:
    """Convert, load, compare; then, and only then, put the files in their place."""
    if to.fixed_size:
        example = fit(example, size, images.fill)
    path = os.path.join(output, f"student.{to.suffix}")
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=output) as folder:
        unfinished = os.path.join(folder, os.path.basename(path))
        try:
            to.convert(student, example, unfinished)
            runner = to.load(unfinished)
            agreement = agreement_of(to, runner, student, images, size)
        except NotExportable as e:
            raise ConfigError("--format", to.name, str(e), "leave it out") from e
        if not agreement.holds:
            raise ConfigError(
                "--format",
                to.name,
                f"the file was dropped: {agreement.unmatched} detections differ from the eager "
                f"student's {agreement.detections} by more than {TOLERANCES}",
                "use another format",
            )
        sidecar = {
            "file": os.path.basename(path),
            "format": to.name,
            "runs_with": to.runs_with,
            **about,
            "input_size": list(size) if to.fixed_size else None,
            "agreement": {**asdict(agreement), "tolerances": TOLERANCES, "may_differ": UNMATCHED},
        }
        replace(f"{path}.json", lambda f: f.write(json.dumps(sidecar, indent=1).encode()))
        with open(unfinished, "rb") as source:
            replace(path, lambda f: shutil.copyfileobj(source, f))
    megabytes = os.path.getsize(path) / 2**20
    result.files[to.name] = {"path": path, **asdict(agreement)}
    result.megabytes[to.name] = megabytes
    return {to.name: runner}


def agreement_of(
    to: Format, runner: Runner, student: nn.Module, images: Images, size: Tuple[int, int]
) -> Agreement:
    """Both on every image; of fixed size, if the format wants it."""
    names = outputs_of(student)
    total = None
    for image in images.tensors:
        image = fit(image, size, images.fill) if to.fixed_size else image
        try:
            exported = runner(image)
        except Exception as e:
            reason = str(e).strip().splitlines()[-1:] or [type(e).__name__]
            shape = "x".join(map(str, image.shape[-2:]))
            raise NotExportable(f"the file fails on an image of {shape}: {reason[0]}") from e
        found = compare(names, detect(student, image), exported, image.shape[-2:])
        total = found if total is None else total + found
    return total


def _describe(cfg: DictConfig, student: nn.Module, images: Images) -> Dict[str, Any]:
    """What a program that knows nothing of this package needs to run the file."""
    return {
        "inputs": {
            "image": {
                "shape": [3, "H", "W"],
                "dtype": "uint8",
                "channels": images.input_format,
                "resize": images.resize,
                "preprocessing": images.preprocessing,
                "fill": images.fill,
            }
        },
        "in_graph": {
            "pixel_mean": student.pixel_mean.flatten().tolist(),
            "pixel_std": student.pixel_std.flatten().tolist(),
            "padding_to_a_multiple_of": student.backbone.size_divisibility,
        },
        "outputs": outputs_of(student),
        "order": "descending score",
        "classes": _class_names(cfg, num_classes(student)),
        "device": "cpu",
        "checkpoint": {
            "file": os.path.basename(cfg.train.init_checkpoint),
            "fingerprint": fingerprint(student),
        },
        "versions": versions(),
    }


def _class_names(cfg: DictConfig, count: Optional[int]) -> List[str]:
    names = OmegaConf.select(cfg, "dataloader.test.dataset.names")
    name = names if isinstance(names, str) else (list(names) if names else [""])[0]
    classes = MetadataCatalog.get(name).get("thing_classes", None) if name else None
    if classes and len(classes) == count:
        return list(classes)
    return [str(i) for i in range(count or 0)]


def _measure(
    result: Export,
    cfg: DictConfig,
    student: nn.Module,
    runners: Mapping[str, Runner],
    image: Tensor,
    input_format: str,
    rounds: int,
) -> None:
    """Latency of student, files and teacher in turn, so that what slows one slows all of them."""
    arms: Dict[str, Callable[[], Any]] = {"student": lambda: detect(student, image)}
    arms.update((name, partial(run, image)) for name, run in runners.items())
    try:
        teacher = _teacher(cfg)
    except ConfigError as e:
        result.about["no_teacher"] = f"{e.key}={e.value}: {e.problem.partition(' (')[0]}"
    else:
        seen = image if teacher.input_format == input_format else image.flip(0)
        result.megabytes["teacher"] = _megabytes(teacher.model)
        try:
            detect(teacher.model, seen)
        except NotExportable as e:
            result.about["no_teacher"] = str(e)
        else:
            arms["teacher"] = lambda: detect(teacher.model, seen)
    seconds: Dict[str, List[float]] = {name: [] for name in arms}
    for turn in range(-WARM_UP, rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    result.milliseconds = {
        name: {"median": 1e3 * median(x), "low": 1e3 * min(x), "high": 1e3 * max(x)}
        for name, x in seconds.items()
    }


def _teacher(cfg: DictConfig) -> FrozenTeacher:
    """The teacher, only to be measured beside the student; it has to have weights on this disk."""
    node = cfg.model.get("teacher")
    weights = node.get("weights") if node is not None else None
    if not weights or not os.path.isfile(weights):
        raise ConfigError(
            "model.teacher.weights", weights, "no such file", "name one to measure the teacher, too"
        )
    return construct(node, "model.teacher")


def _megabytes(model: nn.Module) -> float:
    return sum(x.numel() * x.element_size() for x in model.state_dict().values()) / 2**20
