"""Compares students: the same teacher trains each with the same methods; AP against latency and size.

An arm is one student with one method and one seed.  Each student has a comparison of methods of its own, in
``output/<student>``, as :mod:`~sharedkd.lab.compare.comparison` makes it, so that its gains are paired by
seed with its own plain student.
"""

import json
import re
import shlex
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from omegaconf import DictConfig

from sharedkd.config import student_only
from sharedkd.config.depth import DEPTHS, ONE_OF
from sharedkd.engine.hooks.record import hardware
from sharedkd.errors import ConfigError
from sharedkd.lab.analysis.models import trained_student
from sharedkd.lab.export import FORMATS, export_student
from sharedkd.lab.export.deploy import WARM_UP, megabytes
from sharedkd.lab.export.images import read_images
from sharedkd.lab.output import write_json
from sharedkd.lab.runs import short
from sharedkd.lab.timing import spread, take_turns
from sharedkd.methods import DEFAULT, PLAIN
from sharedkd.modeling.detectors import config_path, load_file
from sharedkd.values import check_number

from .comparison import Arm, Comparison
from .student_summary import write_students
from .tradeoff import EAGER

__all__ = ["Student", "measure", "run_students"]

ROUNDS = 20  # timed runs of a student
#: What `width` multiplies of a classic yaml, below MODEL: the channels of FPN and heads.
WIDTHS = (
    "FPN.OUT_CHANNELS",
    "ROI_BOX_HEAD.FC_DIM",
    "ROI_BOX_HEAD.CONV_DIM",
    "ROI_MASK_HEAD.CONV_DIM",
)


@dataclass(frozen=True)
class Student:
    """A detector to train: how it was named, its config, and ``key=value`` of it alone."""

    text: str
    config: str
    settings: Tuple[str, ...]

    @classmethod
    def of(cls, text: str, config_file: Optional[str] = None) -> "Student":
        """Read ``CONFIG``, ``CONFIG:key=value:...`` or, of ``config_file``, ``key=value:...``."""
        first, *settings = re.split(r":(?=[^:=]+=)", text)
        if "=" in first:
            first, settings = config_file, [first, *settings]
        if not first:
            fix = "write CONFIG:key=value, or add --config-file"
            raise ConfigError("--students", text, "names no config", fix)
        return cls(text, first, tuple(settings))

    @property
    def name(self) -> str:
        """The config's name and the settings without their groups, as a folder can have it."""
        pairs = (setting.split("=", 1) for setting in self.settings)
        parts = [f"{key.rpartition('.')[2]}-{Path(value).name}" for key, value in pairs]
        return re.sub(r"[^\w.:+-]", "-", ":".join([Path(self.config).stem, *parts]))

    @property
    def overrides(self) -> List[str]:
        """The settings, with the keys that ``depth`` and ``width`` stand for."""
        return [x for setting in self.settings for x in self._expanded(setting)]

    def _expanded(self, setting: str) -> List[str]:
        key, _, value = setting.partition("=")
        if key == "depth":
            if value not in DEPTHS:
                problem = f"{setting} is no ResNet's depth"
                raise ConfigError("--students", self.text, problem, ONE_OF)
            return [f"distill.depth={value}"]
        if key != "width":
            return [setting]
        yaml = load_file(config_path(self.config) or self.config, "--students")
        if not isinstance(yaml, CfgNode):
            fix = f"write its own keys, {self.config}:KEY=VALUE:..., or a config of that student"
            raise ConfigError("--students", self.text, "width is for classic yamls", fix)
        try:
            channels = {name: reduce(getattr, name.split("."), yaml.MODEL) for name in WIDTHS}
            check_number("width", float(value), above=0)
            return [f"MODEL.{name}={round(n * float(value))}" for name, n in channels.items()]
        except (ValueError, ConfigError) as e:
            problem, fix = f"{setting} is no number above 0", "write width=0.5"
            raise ConfigError("--students", self.text, problem, fix) from e


def run_students(
    root: Path,
    students: Sequence[Student],
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    overrides: Sequence[str] = (),
    jobs: int = 1,
    shard: Tuple[int, int] = (0, 1),
    latency_ms: Optional[float] = None,
) -> Dict[str, Dict[str, Any]]:
    """Train what is missing of each student, export and time it, and report after each.

    Args:
        root, methods, seeds, output, overrides, jobs: see :class:`~.comparison.Comparison`.
        students: each has its own baseline, folder and report.
        shard: latencies are measured only without shards, as other runs would slow them down.
        latency_ms: the budget, which is drawn and marked.

    Returns:
        name -> record, see :mod:`~sharedkd.lab.compare.tradeoff`.
    """
    _check(students, output, overrides)
    comparisons: Dict[str, Comparison] = {}
    for x in students:
        own = [*overrides, *x.overrides]
        folder = output / x.name
        comparisons[x.name] = Comparison(root, x.config, methods, seeds, folder, own, jobs)
    found = {",".join(x.methods) for x in comparisons.values()}
    if len(found) > 1:  # each config's own default
        fix = f"name them, as --methods {PLAIN},{DEFAULT}"
        raise ConfigError("--methods", "; ".join(sorted(found)), "differ by student", fix)
    for name, comparison in comparisons.items():
        print(f"checks of {name}", flush=True)
        comparison.prepare()
    named = [x.config + "".join(f":{s}" for s in x.settings) for x in students]
    limit = [] if latency_ms is None else ["--latency-ms", f"{latency_ms:g}"]
    what = ["--students", ",".join(named), *limit]
    command = shlex.join(comparison.command(what, output, overrides))
    timed = shard[1] == 1
    records = {name: _record(x.report(), x, timed=False) for name, x in comparisons.items()}
    for number, (name, comparison) in enumerate(comparisons.items(), start=1):
        print(f"student {number} of {len(comparisons)}: {name}", flush=True)
        records[name] = _record(comparison.run(shard), comparison, timed)
        write_students(records, output, command, latency_ms)
    return records


def _check(students: Sequence[Student], output: Path, overrides: Sequence[str]) -> None:
    if not any(text.startswith("distill.teacher=") for text in overrides):
        names = ",".join(student.text for student in students)
        raise ConfigError("--students", names, "have no teacher", "add --teacher")
    if (output / "configs").is_dir():
        problem = "holds a comparison of methods alone"
        raise ConfigError("--output", short(output), problem, "choose another folder")
    found: Dict[str, Student] = {}
    for student in students:
        other = found.setdefault(student.name, student)
        if other is not student:
            fix = "rename a file, or write the settings into one"
            raise ConfigError("--students", student.text, f"has the name of {other.text}", fix)


def _record(record: Dict[str, Any], comparison: Comparison, timed: bool) -> Dict[str, Any]:
    del record["configs"]  # they are in the student's own results.json
    return {**record, "deployed": _deployed(comparison, timed)}


def _deployed(comparison: Comparison, timed: bool) -> Optional[Dict[str, Any]]:
    """What :func:`measure` says of the first seed's student, a distilled one if there is one."""
    arms = [a for a in comparison.arms if a.seed == comparison.seeds[0] and a.run.finished]
    for arm in sorted(arms, key=lambda arm: arm.method == PLAIN)[:1]:
        try:
            return measure(arm, timed)
        except Exception as e:  # whatever it is, the other students go on
            print(f"      no latency: {e}", flush=True)
    return None


def measure(arm: Arm, timed: bool = True) -> Optional[Dict[str, Any]]:
    """Export the student of a finished arm and time it on one validation image, once for all.

    The result lies in the run's folder, ``deployed.json``, and the file in ``deployed/``.

    Returns:
        ``method``, ``seed``; ``format`` (one of FORMATS, or EAGER and ``why``), ``file``,
        ``megabytes`` (of the file, or of the weights), ``milliseconds`` (``median``, ``low``,
        ``high``), ``rounds``, ``image`` (height, width) and ``hardware`` with the number of threads.
        None if it was not measured before, and is not now because of ``timed``.
    """
    path = arm.run.folder / "deployed.json"
    if path.exists():
        return json.loads(path.read_text())
    if not timed:
        return None
    cfg = student_only(arm.run.cfg)
    cfg.train.init_checkpoint = str(arm.run.weights)
    found = _exported(cfg, arm.run.folder / "deployed")
    found = {"method": arm.method, "seed": arm.seed, "rounds": ROUNDS, **found}
    write_json(path, found)
    return found


def _exported(cfg: DictConfig, folder: Path) -> Dict[str, Any]:
    """Size and latency of the first format that takes the student; else of the eager model."""
    why = ""
    for name in ("torchscript", "onnx"):
        if FORMATS[name].missing():
            continue
        try:
            result = export_student(cfg, [name], str(folder), rounds=ROUNDS)
        except ConfigError as e:  # no format would take it: it detects nothing, or no instances
            why = e.problem
            break
        if name in result["models"]:
            file = result["models"][name]
            found = {"format": name, "file": short(file["path"])}
            found.update({key: file[key] for key in ("megabytes", "milliseconds")})
            return {**found, **{key: result[key] for key in ("image", "hardware")}}
        why = "; ".join(result["refused"])
    return {"format": EAGER, "why": " ".join(why.split()), "file": None, **_eager(cfg)}


@torch.no_grad()
def _eager(cfg: DictConfig) -> Dict[str, Any]:
    """The same of the eager student, which may detect nothing, or something else than instances."""
    student = trained_student(cfg, cfg.train.init_checkpoint, "train.init_checkpoint")
    image = max(read_images(cfg).tensors, key=torch.numel)
    arms = {EAGER: lambda: student([{"image": image}])}
    spent = [1e3 * x for x in take_turns(arms, ROUNDS, WARM_UP)[EAGER]]
    size = {"megabytes": megabytes(student), "image": list(image.shape[-2:])}
    return {**size, "milliseconds": spread(spent), "hardware": hardware(torch.device("cpu"))}
