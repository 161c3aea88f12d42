"""run.json: command, hardware, versions, cost and results of a training run."""

import hashlib
import json
import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union

import torch
from detectron2.engine import hooks
from detectron2.utils import comm

from sharedkd.errors import ConfigError
from sharedkd.files import replace
from sharedkd.modeling.detectors import count_parameters
from sharedkd.modeling.hardware import has_bfloat16
from sharedkd.modeling.meta_arch import losses_of
from sharedkd.weights.loading import fingerprint

__all__ = [
    "RunRecord",
    "hardware",
    "peak_memory_mb",
    "read_record",
    "versions",
]

FILE = "run.json"
_PACKAGES = ("torchvision", "detectron2", "numpy")


class RunRecord(hooks.HookBase):
    """Writes run.json at the start of a run and again at its end.

    At the start:

    - ``validation``: the data that it is evaluated on.
    - ``command``, ``config_file``, ``overrides``: how it was started.
    - ``repairs``: those of its data, a line each.
    - ``unlabelled_images``: how many it learns from.
    - ``inherited``: how many tensors are the teacher's.
    - ``fitted``: lateral of the FPN -> how much of its teacher's it explains.
    - ``fast_dev_run``
    - ``initial_weights``: fingerprint of the student before its first step.
    - ``stages``: their names.
    - ``parameters``: of ``student`` and ``losses``.
    - ``hardware``, ``processes``, ``versions``

    At the end:

    - ``iterations``
    - ``peak_memory_mb``: allocated on the GPU; on a CPU the resident memory of the training process.
    - ``skipped``: how many ``steps`` and ``images`` were left out, see ``train.on_nonfinite`` and
      ``on_bad_image``; of images, those of the main process.
    - ``outgrown``: teacher -> the iteration after which the student was level with it.
    - ``results``: of the last evaluation.

    Args:
        folder: the run's output folder.
        trainer: of the run, before its first step.
        started: the first eight keys.
        resuming: keep the first entries of the run's own record.
    """

    def __init__(self, folder: str, trainer: Any, started: Mapping[str, Any], resuming: bool):
        self.path = os.path.join(folder, FILE)
        self.memory: Optional[float] = None
        student, losses = trainer.detector, losses_of(trainer.module)
        before = read_record(folder) if resuming else {}
        self.record = {
            **{key: before.get(key, value) for key, value in started.items()},
            "initial_weights": before.get("initial_weights") if resuming else fingerprint(student),
            "parameters": {
                "student": count_parameters(student),
                "losses": count_parameters(losses),
            },
            "hardware": hardware(trainer.device),
            "processes": comm.get_world_size(),
            "versions": versions(),
            "stages": [*trainer.stages],
        }

    def before_train(self) -> None:
        self._write()

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self.trainer.max_iter:
            self.memory = peak_memory_mb()

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return  # it failed or was stopped, perhaps in its last step
        self.record["iterations"] = self.trainer.max_iter
        self.record["peak_memory_mb"] = self.memory  # null if nothing was left to train
        self.record["skipped"] = {
            "steps": self.trainer.log.total,
            "images": len(self.trainer.bad_images),
        }
        outgrown = self.trainer.outgrown.iterations
        self.record["outgrown"] = {name or "teacher": i for name, i in outgrown.items()}
        self.record["results"] = self.trainer.results
        self._write()

    def _write(self) -> None:
        replace(self.path, lambda f: f.write(json.dumps(self.record, indent=1).encode()))


def read_record(folder: Union[str, Path]) -> Dict[str, Any]:
    """The record of the run in ``folder``; empty if there is none.

    Raises:
        ConfigError: it is damaged.
    """
    path = os.path.join(folder, FILE)
    try:
        with open(path) as f:
            return json.load(f)
    except FileNotFoundError:
        return {}
    except ValueError as e:
        fix = "delete it; only this record is lost"
        raise ConfigError(FILE, path, f"cannot be read: {e}", fix) from e


def hardware(device: torch.device) -> str:
    """The name of ``device`` if it is a GPU, else the CPU's with its instructions and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    instructions = torch.backends.cpu.get_cpu_capability()
    instructions += "" if has_bfloat16() else " without bfloat16"
    return f"{_cpu_name()} ({instructions}), {torch.get_num_threads()} thread(s)"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> Dict[str, str]:
    """Versions of Python and the main libraries, and a digest of this package's files."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a source tree on the path
            pass
    # Two states of the code may share a version number.
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[2].rglob("*.py")):
        digest.update(path.read_bytes())
    found["sharedkd"] = digest.hexdigest()[:8]
    return found


def peak_memory_mb() -> float:
    """The peak memory so far in MB: allocated on the GPU, or resident in this process on a CPU."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:  # Linux's getrusage counts the process that started this one, too
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
