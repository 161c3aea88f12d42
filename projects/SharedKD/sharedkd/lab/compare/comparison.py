"""Compares methods: trains every method with every seed, all else equal, and records the results.

An *arm* is one method with one seed: a training run in a folder of its own, whose config lies beside
it and can be trained by tools/lazyconfig_train_net.py as well.  Arms of one seed start from the same
student weights and see the same images in the same order with the same augmentation.
"""

import json
import math
import os
import shlex
import subprocess
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any, Dict, List, Optional, Sequence, Tuple
from uuid import uuid4

import numpy as np
import torch
from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from sharedkd.config import load_config
from sharedkd.config.build import construct
from sharedkd.engine.lock import BusyError
from sharedkd.engine.parts import build
from sharedkd.engine.resume import differences
from sharedkd.engine.run import evaluate_teacher
from sharedkd.errors import ConfigError
from sharedkd.files import replace
from sharedkd.lab.metrics import read_curves, seconds_per_step
from sharedkd.lab.progress import LiveLine, Progress, Remaining
from sharedkd.lab.runs import Run, short, tool
from sharedkd.lab.scores import TASKS, folder_name, is_known
from sharedkd.methods import PLAIN, with_method
from sharedkd.modeling.meta_arch import SharedKD

from .events import write_events
from .summary import write

__all__ = ["Arm", "Comparison", "run_comparison"]

WRITER = f".{uuid4().hex[:8]}"  # several machines may write into the folder of a comparison
FOR_THE_TIME_OF = "@"  # none@fgd: the plain student, trained for as long as fgd takes


@dataclass
class Arm:
    """One method with one seed.

    Args:
        method: its name; ``a@b`` is method a, trained for the time that b takes.
        seed: of the student's weights, the data and every draw.
        run: the training run.
    """

    method: str
    seed: int
    run: Run

    @property
    def failure(self) -> Path:
        return self.run.folder / "failed.txt"

    @property
    def status(self) -> str:
        if self.run.finished:
            return "finished"
        return "failed" if self.failure.exists() else "missing"

    def _curves(self) -> Dict[str, np.ndarray]:
        try:
            return read_curves(str(self.run.folder / "metrics.json"))
        except FileNotFoundError:
            return {}

    def _aps(self, curves: Dict[str, np.ndarray]) -> Dict[str, List[Tuple[int, float]]]:
        """Task -> (iterations trained, AP) of each evaluation."""
        last, found = self.run.record.get("iterations") or math.inf, {}
        for task in TASKS:
            rows = zip(curves.get("iteration", ()), curves.get(f"{task}/AP", ()))
            points = [(int(min(i + 1, last)), float(ap)) for i, ap in rows if is_known(ap)]
            if points:
                found[task] = points
        return found

    @property
    def seconds_per_step(self) -> float:
        """Median over the run; NaN before its first logged step."""
        return seconds_per_step(self._curves())

    def record(self) -> Dict[str, Any]:
        """Its entry in results.json."""
        status, record, curves = self.status, self.run.record, self._curves()
        return {
            "method": self.method,
            "seed": self.seed,
            "config": short(self.run.config),
            "status": status,
            "error": self.failure.read_text().strip() if status == "failed" else None,
            "seconds_per_step": seconds_per_step(curves),
            "curve": self._aps(curves),
            **record,
        }


class Comparison:
    """All arms of a comparison.

    Args:
        root: the repository.
        config_file: of a pair.
        methods: names as :func:`~sharedkd.config.methods.with_method` takes them, and ``a@b``: method a,
            trained for the time that b takes.
        seeds: one arm each per method.
        output: folder of the arms and the report.
        overrides: ``key=value`` for all arms.
        jobs: how many arms are trained side by side on this machine.

    Raises:
        ConfigError: a name that this pair does not have, no baseline, or a bad config.
    """

    def __init__(
        self,
        root: Path,
        config_file: str,
        methods: Sequence[str],
        seeds: Sequence[int],
        output: Path,
        overrides: Sequence[str] = (),
        jobs: int = 1,
    ):
        self.jobs = jobs
        self.root, self.output = root, output
        self.config_file, self.overrides = config_file, list(overrides)
        self.methods, self.seeds = list(dict.fromkeys(methods)), list(dict.fromkeys(seeds))
        self._check_names()
        self.cfg = load_config(config_file, overrides, keep_teacher=True)
        self.configs = {
            method: with_method(self.cfg, method.split(FOR_THE_TIME_OF)[0])
            for method in self.methods
        }

    def _check_names(self) -> None:
        if PLAIN not in self.methods:
            raise ConfigError(
                "--methods",
                ",".join(self.methods),
                f"has no baseline, the plain student {PLAIN}",
                f"add {PLAIN}",
            )
        for seed in self.seeds:
            if seed < 0:
                raise ConfigError("--seeds", seed, "is negative", "use 0 or more")
        folders: Dict[str, str] = {}
        for method in self.methods:
            trained, at, timed = method.partition(FOR_THE_TIME_OF)
            for part in (trained, timed) if at else ():
                if FOR_THE_TIME_OF in part or part not in self.methods:
                    raise ConfigError(
                        "--methods", method, f"needs {part}, which is not listed", f"add {part}"
                    )
            other = folders.setdefault(folder_name(method), method)
            if other != method:
                raise ConfigError(
                    "--methods", method, f"has the name of {other}", "rename one of the files"
                )

    def prepare(self) -> None:
        """Bind every method to the pair, evaluate the teacher once, and write the arms' configs.

        Raises:
            ConfigError: a method does not fit the pair, or the folder holds a comparison with other
                settings.
        """
        model = build(self.cfg)
        teacher = getattr(model, "teacher", None)
        for method, cfg in self.configs.items():
            if "=" in method:
                build(cfg)  # its keys may change any part of the model
            elif "student" in cfg.model:
                SharedKD(
                    student=model.student,
                    teacher=teacher,
                    stages=construct(cfg.model.stages, "model.stages"),
                    input_format=model.input_format,
                )
        path = self.output / "teacher.json"
        if teacher is not None and not path.exists():
            print("the teacher's evaluation", flush=True)
            with redirect_stdout(StringIO()):  # pycocotools prints
                results = evaluate_teacher(self.cfg, model)
            self.output.mkdir(parents=True, exist_ok=True)
            replace(str(path), lambda f: f.write(json.dumps(results).encode()), WRITER)
        del model, teacher
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the arms run in other processes
        for method in self.methods:
            if FOR_THE_TIME_OF not in method:
                self._save_config(method, self.configs[method])

    def _save_config(self, method: str, cfg: DictConfig) -> None:
        ends = {stage.get("end") for stage in _stages(cfg)}
        if cfg.train.eval_teacher is None and "teacher" not in ends:
            cfg.train.eval_teacher = False  # it was evaluated once for all arms
        path = self._config_path(method)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f"{WRITER}.yaml")
        LazyConfig.save(cfg, str(new))
        if path.exists() and path.read_text() != new.read_text():
            changed = differences(str(path), str(new))
            new.unlink()
            key, then, now = changed[0] if changed else ("the file", "older", "newer")
            raise ConfigError(
                "--output",
                short(self.output),
                f"holds a comparison with other settings of {method}, {key}={then} instead of {now}",
                "choose another folder, or the settings of " + short(path),
            )
        new.replace(path)

    def _saved_config(self, method: str) -> Optional[Dict[str, Any]]:
        path = self._config_path(method)
        if not path.exists():
            return None
        # A config may hold a class, such as a kind of block, which JSON has no word for.
        return json.loads(
            json.dumps(OmegaConf.to_container(LazyConfig.load(str(path))), default=str)
        )

    def _config_path(self, method: str) -> Path:
        return self.output / "configs" / f"{folder_name(method)}.yaml"

    @cached_property
    def arms(self) -> List[Arm]:
        """All arms, seed by seed, so that an interrupted comparison has full seeds; ``a@b`` are last."""
        arms = []
        for timed in (False, True):
            for seed in self.seeds:
                for method in self.methods:
                    if (FOR_THE_TIME_OF in method) == timed:
                        config = self._config_path(method)
                        folder = self.output / folder_name(method) / f"seed{seed}"
                        settings = [f"train.output_dir={folder}", f"train.seed={seed}"]
                        arms.append(Arm(method, seed, Run(config, settings, folder)))
        return arms

    def seconds_per_step(self, method: str) -> float:
        """Seconds per step, the mean over the finished arms of ``method``; NaN before one is."""
        seconds = [a.seconds_per_step for a in self.arms if a.method == method and a.run.finished]
        return fmean(seconds) if seconds else math.nan

    def iterations(self, method: str) -> Optional[int]:
        """The number of steps of ``method``; None while it depends on unfinished runs.

        This writes the config of a method ``a@b``, once: an arm that was started must not change its
        length.  Failed runs are left out.

        Raises:
            ConfigError: all runs that it depends on failed.
        """
        path = self._config_path(method)
        if FOR_THE_TIME_OF not in method:
            return self.cfg.train.max_iter
        if path.exists():
            return LazyConfig.load(str(path)).train.max_iter
        ours, theirs = method.split(FOR_THE_TIME_OF)
        sources = [arm for arm in self.arms if arm.method in (ours, theirs)]
        if any(arm.status == "missing" for arm in sources):
            return None
        cfg = self.configs[method].copy()
        if not cfg.train.fast_dev_run:  # which sets a length of its own
            ratio = self.seconds_per_step(theirs) / self.seconds_per_step(ours)
            if not math.isfinite(ratio):
                raise ConfigError(
                    "--methods",
                    method,
                    "has no time to take: the runs that it depends on failed",
                    "repair the failed runs",
                )
            cfg.train.max_iter = round(cfg.train.max_iter * ratio)
        self._save_config(method, cfg)
        return cfg.train.max_iter

    def train(self, shard: Tuple[int, int] = (0, 1)) -> None:
        """Train the arms of a shard that are not finished; a failed one does not stop the others.

        Args:
            shard: (i, n): train the i-th of n shards of the arms; :meth:`prepare` comes before it.
        """
        if self.jobs > 1:
            self._train_in_processes(shard)  # the arms ``a@b`` are left
        mine = [
            arm
            for arm in self.arms
            if (self.methods.index(arm.method) + self.seeds.index(arm.seed)) % shard[1] == shard[0]
        ]
        live, kept = LiveLine(), sum(arm.run.finished for arm in mine)
        remaining, tried = Remaining(len(mine) - kept), 0
        for number, arm in enumerate(mine, start=1):
            title = f"[{number}/{len(mine)}] {arm.method}, seed {arm.seed}"
            if arm.run.finished:
                print(f"{title}: finished before, kept", flush=True)
                continue
            if self.jobs > 1 and arm.status == "failed":
                continue  # just now
            live.keep(title)

            def say(progress: Progress) -> None:
                left = remaining.text(tried + progress.fraction)
                arms = f"{number - 1} of {len(mine)} arms done, 1 running, all: {left}"
                live.update(f"      {progress}   ({arms})", progress.is_last)

            try:
                iterations = self.iterations(arm.method)
                if iterations is None:
                    live.keep("      waits for other arms; run the command again")
                    continue
                arm.failure.unlink(missing_ok=True)
                arm.run.train(self.root, iterations, say)
            except BusyError as e:
                live.keep(f"      {e}")
            except Exception as e:  # whatever it is, the other arms go on
                live.keep(f"      failed: {e}")
                with suppress(OSError):
                    arm.run.folder.mkdir(parents=True, exist_ok=True)
                    arm.failure.write_text(f"{e}\n")
            tried += 1
            try:
                self.report()
            except Exception as e:  # the end of the comparison tries it again
                live.keep(f"      no report: {e}")

    def _train_in_processes(self, shard: Tuple[int, int]) -> None:
        """Split a shard into smaller ones, each trained by a process of its own, and wait for them."""
        i, n = shard
        processes = [
            # They share a terminal, on which none may rewrite what another wrote.
            subprocess.Popen(
                [*self.command(), "--jobs", "1", "--shard", f"{i + n * job}/{n * self.jobs}"],
                env={**os.environ, "TERM": "dumb"},
            )
            for job in range(self.jobs)
        ]
        try:
            for process in processes:
                process.wait()
        except BaseException:
            for process in processes:
                process.terminate()  # each ends the run that it has started
            for process in processes:
                process.wait()
            raise

    def report(self) -> Dict[str, Any]:
        """Write results.json, report.md and the plots of the arms that are finished.

        Returns:
            the record, as :mod:`sharedkd.lab.scores` describes it.
        """
        path = self.output / "teacher.json"
        record = {
            "config_file": self.config_file,
            "overrides": self.overrides,
            "command": shlex.join(self.command()),
            "baseline": PLAIN,
            "teacher": json.loads(path.read_text()) if path.exists() else None,
            "methods": self.methods,
            "configs": {method: self._saved_config(method) for method in self.methods},
            "arms": [arm.record() for arm in self.arms],
        }
        _count_collapsed(record)
        write(record, str(self.output), WRITER)
        return record

    def write_events(self, record: Dict[str, Any]) -> None:
        """Write ``record``, of :meth:`report`, for TensorBoard; on a full disk nothing.

        See :mod:`sharedkd.lab.compare.events`.
        """
        try:
            write_events(self.output, record)
        except OSError as e:
            print(f"nothing for TensorBoard: {e}", flush=True)

    def command(self) -> List[str]:
        """The command line of this comparison."""
        return [
            *tool("compare_methods.py", self.root),
            *("--config-file", short(self.config_file)),
            *("--methods", ",".join(self.methods)),
            *("--seeds", ",".join(map(str, self.seeds))),
            *("--output", short(self.output)),
            *(("--jobs", str(self.jobs)) if self.jobs > 1 else ()),
            *self.overrides,
        ]


def _stages(cfg: DictConfig) -> List[DictConfig]:
    nodes = cfg.model.get("stages") or {}
    return [node for node in nodes.values() if isinstance(node, DictConfig)]


def _count_collapsed(record: Dict[str, Any]) -> None:
    """Set the AP of a detector that finds nothing to zero: Detectron2 reports none.

    Its task is named under ``collapsed``.  APs, APm and APl are zero where another arm, or the
    teacher, has one: without any, there are no objects of that size.
    """
    arms = [arm for arm in record["arms"] if arm["status"] == "finished"]
    everything = [record["teacher"] or {}, *(arm["results"] for arm in arms)]
    for arm in arms:
        arm["collapsed"] = []
        for task, metrics in arm["results"].items():
            if not np.isnan(metrics.get("AP", 0.0)):
                continue
            arm["collapsed"].append(task)
            for name in metrics:
                known = [x[task][name] for x in everything if name in x.get(task, {})]
                if name in ("AP", "AP50", "AP75") or not np.all(np.isnan(known)):
                    metrics[name] = 0.0


def run_comparison(
    root: Path,
    config_file: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    overrides: Sequence[str] = (),
    shard: Tuple[int, int] = (0, 1),
    jobs: int = 1,
) -> Dict[str, Any]:
    """Train what is missing, then report.

    Args:
        root, config_file, methods, seeds, output, overrides, jobs: see :class:`Comparison`.
        shard: see :meth:`Comparison.train`.

    Returns:
        the record, see :meth:`Comparison.report`.

    Raises:
        ConfigError: see :class:`Comparison` and :meth:`Comparison.prepare`.
    """
    comparison = Comparison(root, config_file, methods, seeds, output, overrides, jobs)
    comparison.prepare()
    comparison.train(shard)
    record = comparison.report()
    comparison.write_events(record)
    return record
