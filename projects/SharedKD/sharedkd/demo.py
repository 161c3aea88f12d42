"""The embedded example of tools/demo.py: three training commands, a table and two pictures."""

import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Dict, List, Mapping, Sequence

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from omegaconf import DictConfig
from torch import nn

from .analysis.pictures import loss_curves, read_curves, side_by_side
from .analysis.tables import results_table
from .config import load_config, student_only
from .engine import build
from .errors import ConfigError

__all__ = ["run_demo", "seconds_per_image"]

TITLES = {
    "teacher": "teacher, ResNet-50",
    "plain": "plain student, ResNet-18",
    "sharedkd": "Shared-KD student, ResNet-18",
}

# What of a run's log is worth a line on the console.
_TRAINING = re.compile(r"(?:eta: (?P<eta>.+?)\s+)?iter: (?P<iter>\d+)\s.*total_loss: (?P<loss>\S+)")
_TESTING = re.compile(r"Inference done (?P<done>\d+/\d+)\..*ETA=(?P<eta>\S+)")


@dataclass
class Arm:
    """One of the runs to compare.

    Attributes:
        name: of its config and its folder.
        config: the file.
        overrides: what the command line adds to the config.
    """

    name: str
    config: Path
    overrides: Sequence[str]

    @cached_property
    def cfg(self) -> DictConfig:
        return load_config(str(self.config), self.overrides)

    @property
    def folder(self) -> Path:
        return Path(self.cfg.train.output_dir)

    @property
    def weights(self) -> Path:
        return self.folder / "model_final.pth"

    @property
    def started(self) -> bool:
        return (self.folder / "last_checkpoint").exists()

    @property
    def finished(self) -> bool:
        """Whether it is trained and evaluated."""
        if not self.weights.exists():
            return False
        box = self.results().get("bbox", {})
        return not math.isnan(box.get("AP", math.nan))  # NaN: only evaluated earlier in training

    def results(self) -> Dict[str, Dict[str, float]]:
        """Task to metric to value, of the evaluation after the last iteration; empty without one."""
        curves = read_curves(str(self.folder / "metrics.json"))
        results: Dict[str, Dict[str, float]] = {}
        for name, values in curves.items():
            task, _, metric = name.partition("/")
            if task in ("bbox", "segm"):
                results.setdefault(task, {})[metric] = values[-1]
        return results

    def check(self) -> None:
        """Raises:
        ConfigError: its folder holds a run of another config.
        """
        if not self.started:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            LazyConfig.save(self.cfg, str(path))
            same = path.read_text() == (self.folder / "config.yaml").read_text()
        if not same:
            _refuse(self.folder, "holds a run with other settings")

    def train(self, root: Path) -> None:
        """Run the training command, or what is left of it, with its progress on the console."""
        if self.finished:
            print(f"      finished before, kept: {_short(self.weights)}")
            return
        command = [
            _short(sys.executable),
            _short(root / "tools/lazyconfig_train_net.py"),
            "--config-file",
            _short(self.config),
            *(["--resume"] if self.started else []),
            *self.overrides,
        ]
        print(f"      {shlex.join(command)}", flush=True)
        start = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        _follow(command, self.folder / "console.txt", self.cfg.train.max_iter)
        print(f"      {time.perf_counter() - start:.0f} s", flush=True)

    def model(self) -> nn.Module:
        """The trained detector, alone and in evaluation mode."""
        cfg = student_only(self.cfg)
        cfg.train.init_checkpoint = str(self.weights)
        return build(cfg, trained=True).eval()


def run_demo(root: Path, output: Path, overrides: Sequence[str] = ()) -> str:
    """Draw data, train what is not trained yet, compare, and say where the pictures are.

    Args:
        root: the repository.
        output: folder of the runs, the table and the pictures.
        overrides: ``key=value`` for the configs of all three runs.

    Returns:
        the table.

    Raises:
        ConfigError: an override that cannot be applied, an output folder with other runs in it, or
            a run that failed.
    """
    begin = time.perf_counter()
    configs = root / "configs/quickstart"
    _announce(1, "draw the data set")
    shapes = LazyConfig.apply_overrides(
        LazyConfig.load(str(configs / "plain.py")), list(overrides)
    ).shapes
    print(f"      {shapes.train} + {shapes.val} images in {_short(instantiate(shapes))}")

    arms = {name: _arm(configs / f"{name}.py", root, output, overrides) for name in TITLES}
    for arm in arms.values():
        arm.check()
    teacher, student = arms["teacher"], arms["sharedkd"]
    if student.started and not (teacher.finished and _is_older(teacher, student)):
        _refuse(
            student.folder, f"holds a student of another teacher than {_short(teacher.weights)}"
        )
    for number, (name, title) in enumerate(TITLES.items(), start=2):
        _announce(number, f"train and evaluate: {title}")
        arms[name].train(root)

    _announce(5, "compare")
    models = {name: arm.model() for name, arm in arms.items()}
    cfg = arms["plain"].cfg
    mapper = instantiate(cfg.dataloader.test.mapper)
    samples = DatasetCatalog.get(f"{cfg.data.name}_val")
    times = seconds_per_image(models, [mapper(sample) for sample in samples[:30]])
    table = results_table(
        [
            {
                "name": title,
                **arms[name].results(),
                "parameters": sum(p.numel() for p in models[name].parameters()),
                "seconds_per_image": times[name],
            }
            for name, title in TITLES.items()
        ]
    )
    columns = ("plain", "sharedkd", "teacher")
    files = [output / name for name in ("table.md", "detections.png", "losses.png")]
    files[0].write_text(table + "\n")
    side_by_side(
        f"{cfg.data.name}_val", {TITLES[n]: models[n] for n in columns}, mapper, str(files[1])
    )
    loss_curves(
        {n: str(arms[n].folder / "metrics.json") for n in ("plain", "sharedkd")}, str(files[2])
    )
    print(f"\n{table}\n")
    print(
        f"A small example: {shapes.train} drawn images, {cfg.train.max_iter} iterations a student, random "
        f"initial weights, and one seed.\n{shapes.val} validation images and one seed cannot tell "
        "small differences from chance; docs/results.md has measurements.\n"
    )
    for path in files:
        print(_short(path))
    print(f"{(time.perf_counter() - begin) / 60:.1f} minutes")
    return table


def seconds_per_image(
    models: Mapping[str, nn.Module], inputs: Sequence[Dict[str, Any]], warm_up: int = 3
) -> Dict[str, float]:
    """Median time of inference on one image.

    The models take turns, so that whatever else the machine does hits them alike.

    Args:
        models: name to a Detectron2 model in evaluation mode.
        inputs: mapped test images.
        warm_up: how many images each model sees before its clock starts.
    """
    times: Dict[str, List[float]] = {name: [] for name in models}
    with torch.no_grad():
        for sample in [*inputs[:warm_up], *inputs]:
            for name, model in models.items():
                start = time.perf_counter()
                model([sample])
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
    return {name: median(values[min(warm_up, len(inputs)) :]) for name, values in times.items()}


def _arm(config: Path, root: Path, output: Path, overrides: Sequence[str]) -> Arm:
    """With the default output folder, the config alone says where things are."""
    extra: List[str] = []
    if output.resolve() != root / "output/demo":
        extra.append(f"train.output_dir={output.resolve() / config.stem}")
        if config.stem == "sharedkd":
            extra.append(f"model.teacher.weights={output.resolve() / 'teacher/model_final.pth'}")
    return Arm(config.stem, config, [*extra, *overrides])


def _follow(command: Sequence[str], log: Path, max_iter: int) -> None:
    """Run a training command; all it says goes to ``log``, its progress to the console.

    Raises:
        ConfigError: it failed.
    """
    last = deque(maxlen=20)
    with open(log, "a") as file, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    ) as process:
        for line in process.stdout:
            file.write(line)
            last.append(line)
            short = _progress(line, max_iter)
            if short:
                print(f"      {short}", flush=True)
    if process.returncode:
        sys.stderr.writelines(last)
        raise ConfigError(
            "tools/demo.py",
            shlex.join(command),
            f"ended with status {process.returncode}",
            f"see {_short(log)}",
        )


def _progress(line: str, max_iter: int) -> str:
    """What a line of Detectron2's log says of the progress; mostly nothing."""
    found = _TRAINING.search(line)
    if found:
        eta = f"   {found['eta']} left" if found["eta"] else ""
        return f"iteration {int(found['iter']) + 1}/{max_iter}   loss {found['loss']}{eta}"
    found = _TESTING.search(line)
    return f"evaluation {found['done']}   {found['eta']} left" if found else ""


def _is_older(teacher: Arm, student: Arm) -> bool:
    """Whether the student's checkpoint was written after the teacher's."""
    latest = student.folder / "last_checkpoint"
    return teacher.weights.stat().st_mtime < latest.stat().st_mtime


def _refuse(folder: Path, reason: str) -> None:
    raise ConfigError(
        "--output", _short(folder), reason, "remove that folder, or name another with --output DIR"
    )


def _announce(number: int, what: str) -> None:
    print(f"[{number}/5] {what}", flush=True)


def _short(path) -> str:
    """As seen from here, if that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)
