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
from sharedkd.errors import ConfigError, ConfigErrors
from sharedkd.files import replace
from sharedkd.modeling.detectors import num_classes
from sharedkd.modeling.teachers.frozen import FrozenTeacher
from sharedkd.weights.loading import fingerprint, load_trained

from .agreement import TOLERANCES, UNMATCHED, Agreement, compare
from .formats import FORMATS, UNSUPPORTED, NotExportable, Runner, detect, outputs_of
from .images import Images, fit, read_images

__all__ = ["Export", "export_student"]

WARM_UP = 3  # runs that are not counted: TorchScript compiles in its first ones


@dataclass
class Export:
    """The result of an export.

    Args:
        files: format -> path, and :class:`Agreement`'s fields.
        milliseconds: ``student`` (eager), each format, perhaps ``teacher`` -> median, least and
            greatest, on the same image.
        megabytes: of the weights of ``student`` and ``teacher``, and of each file.
        about: image size, hardware, versions, and why there is no teacher.
        refused: what could not be exported, and why.
    """

    files: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    milliseconds: Dict[str, Dict[str, float]] = field(default_factory=dict)
    megabytes: Dict[str, float] = field(default_factory=dict)
    about: Dict[str, Any] = field(default_factory=dict)
    refused: List[ConfigError] = field(default_factory=list)

    def as_json(self) -> Dict[str, Any]:
        return {**vars(self), "refused": [str(e) for e in self.refused]}


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
        cfg: of :func:`~sharedkd.config.load.load_config`; of a pair, the student is exported.
        formats: names in :data:`FORMATS`.
        files: images; none: some of the config's validation set.
        size: (H, W) of the timed image; None: that of the largest of the images.
        rounds: timed runs of each arm; 0: none.

    Raises:
        ConfigError: before anything is written.  What a format refuses is in the result instead.
    """
    _check_formats(formats)
    student = load_student(cfg)
    images = read_images(student_only(cfg), files)
    example = _example(student, images)
    checked = [*images.tensors, *images.corner_cases(example)]
    eager = [detect(student, image) for image in checked]
    about = _describe(cfg, student, images)
    result = Export(megabytes={"student": _megabytes(student)})
    os.makedirs(output, exist_ok=True)
    arms: Dict[str, Callable[[Tensor], Any]] = {"student": partial(detect, student)}
    for name in formats:
        try:
            arms[name] = _export(name, student, example, checked, eager, about, output, result)
        except NotExportable as e:
            result.refused.append(ConfigError("--format", name, str(e), e.fix))
    image = fit(
        example,
        size or images.common_size(max(student.backbone.size_divisibility, 1)),
        images.fill,
    )
    if rounds:
        _add_teacher(arms, result, cfg, image, images.about["channels"])
        result.milliseconds = _time(arms, image, rounds)
    result.about.update(
        image=list(image.shape[-2:]), hardware=hardware(torch.device("cpu")), versions=versions()
    )
    return result


def _check_formats(names: Sequence[str]) -> None:
    errors = []
    for name in names:
        if name in UNSUPPORTED:
            errors.append(ConfigError("--format", name, *UNSUPPORTED[name]))
        elif name not in FORMATS:
            known = ", ".join(FORMATS)
            errors.append(ConfigError("--format", name, "no such format", f"use any of {known}"))
        elif FORMATS[name].missing():
            missing = " and ".join(FORMATS[name].missing())
            fix = f"pip install {' '.join(FORMATS[name].packages)}"
            errors.append(ConfigError("--format", name, f"{missing} is not installed", fix))
    if errors:
        raise ConfigErrors(errors)


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
    return student.requires_grad_(False).eval()


def _example(student: nn.Module, images: Images) -> Tensor:
    """The image with the most detections: tracing follows it through the model."""
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
    name: str,
    student: nn.Module,
    example: Tensor,
    checked: Sequence[Tensor],
    eager: Sequence[Sequence[Tensor]],
    about: Mapping[str, Any],
    output: str,
    result: Export,
) -> Runner:
    """Convert, load, compare; then, and only then, put the files in their place."""
    to = FORMATS[name]
    path = os.path.join(output, f"student.{to.suffix}")
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=output) as folder:
        unfinished = os.path.join(folder, os.path.basename(path))
        to.convert(student, example, unfinished)
        runner = to.load(unfinished)
        agreement = _agreement(outputs_of(student), runner, checked, eager)
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
    result.megabytes[name] = os.path.getsize(path) / 2**20
    result.files[name] = {"path": path, **asdict(agreement)}
    return runner


def _agreement(
    names: Sequence[str],
    runner: Runner,
    images: Sequence[Tensor],
    eager: Sequence[Sequence[Tensor]],
) -> Agreement:
    """Compare the file with the ``eager`` student on every image, whatever its size."""
    total = Agreement(0, 0, 0, 0, {name: 0.0 for name in names if name != "classes"})
    for image, expected in zip(images, eager):
        size = image.shape[-2:]
        try:
            exported = runner(image)
        except Exception as e:
            reason = str(e).strip().splitlines()[-1:] or [type(e).__name__]
            shape = "x".join(map(str, size))
            raise NotExportable(f"the file fails on an image of {shape}: {reason[0]}") from e
        total = total + compare(names, expected, exported, size)
    return total


def _describe(cfg: DictConfig, student: nn.Module, images: Images) -> Dict[str, Any]:
    """The description that a program without this package needs to run the file."""
    return {
        "inputs": {"image": {"shape": [3, "H", "W"], "dtype": "uint8", **images.about}},
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


def _add_teacher(
    arms: Dict[str, Callable[[Tensor], Any]],
    result: Export,
    cfg: DictConfig,
    image: Tensor,
    channels: str,
) -> None:
    """Time the teacher, too, if its weights are on this disk and it is a detector."""
    node = cfg.model.get("teacher")
    weights = node.get("weights") if node is not None else None
    if not weights or not os.path.isfile(weights):
        result.about["no_teacher"] = f"model.teacher.weights={weights}: no such file"
        return
    try:
        teacher: FrozenTeacher = construct(node, "model.teacher")
        flips = teacher.input_format != channels
        arm = lambda x: detect(teacher.model, x.flip(0) if flips else x)  # noqa: E731
        arm(image)
    except (ConfigError, NotExportable) as e:
        result.about["no_teacher"] = str(e)
        return
    result.megabytes["teacher"] = _megabytes(teacher.model)
    arms["teacher"] = arm


def _time(
    arms: Mapping[str, Callable[[Tensor], Any]], image: Tensor, rounds: int
) -> Dict[str, Dict[str, float]]:
    """Milliseconds of each arm; they take turns, so that what slows one slows all of them."""
    spent: Dict[str, List[float]] = {name: [] for name in arms}
    for turn in range(-WARM_UP, rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm(image)
            if turn >= 0:
                spent[name].append(1e3 * (time.perf_counter() - start))
    return {name: {"median": median(x), "low": min(x), "high": max(x)} for name, x in spent.items()}


def _megabytes(model: nn.Module) -> float:
    return sum(x.numel() * x.element_size() for x in model.state_dict().values()) / 2**20
