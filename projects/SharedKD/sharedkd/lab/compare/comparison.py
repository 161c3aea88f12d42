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
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from sharedkd.config import load_config
from sharedkd.config.build import builds_the_same, construct, target_of
from sharedkd.engine.lock import BusyError
from sharedkd.engine.parts import build_parts, check_start
from sharedkd.engine.resume import differences
from sharedkd.engine.run import evaluate_teacher
from sharedkd.errors import ConfigError
from sharedkd.lab.metrics import gradient_share, read_curves, seconds_per_step
from sharedkd.lab.output import WRITER, write_text
from sharedkd.lab.progress import LiveLine, Progress, Remaining
from sharedkd.lab.runs import Run, short, tool
from sharedkd.lab.scores import TASKS, costs_of, folder_name, is_known, mean_of
from sharedkd.methods import DEFAULT, OWN, PLAIN, START, with_method
from sharedkd.modeling.detectors import load_file
from sharedkd.modeling.meta_arch import SharedKD

from .events import write_events
from .summary import write

__all__ = ["Arm", "Comparison"]

FOR_THE_TIME_OF = "@"  # none@fgd: the plain student, trained for as long as fgd takes


@dataclass
class Arm:
    """One method, ``a@b`` is a trained for the time that b takes, with one seed for every draw."""

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

    def record(self) -> Dict[str, Any]:
        """Its entry in results.json."""
        status, record = self.status, self.run.record
        path = self.run.folder / "metrics.json"
        curves = read_curves(str(path)) if path.exists() else {}
        last, aps = record.get("iterations") or math.inf, {}
        for task in TASKS:
            rows = zip(curves.get("iteration", ()), curves.get(f"{task}/AP", ()))
            points = [(int(min(i + 1, last)), float(ap)) for i, ap in rows if is_known(ap)]
            if points:
                aps[task] = points  # iterations trained, AP
        return {
            "method": self.method,
            "seed": self.seed,
            "config": short(self.run.config),
            "status": status,
            "error": self.failure.read_text().strip() if status == "failed" else None,
            "seconds_per_step": seconds_per_step(curves),
            "gradient_share": gradient_share(curves),
            "curve": aps,
            **record,
        }


class Comparison:
    """All arms of a comparison.

    Args:
        root: the repository.
        config_file: of a pair.
        methods: names as :func:`~sharedkd.config.methods.with_method` takes them; paths of configs, which get
            the same overrides, but for those of a teacher of another class; and ``a@b``: method a, trained
            for the time that b takes.  None of them: ``none``, and what the config itself trains, as
            ``shared_kd`` or ``inherit`` if it is that, else as ``config``.
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
        self.cfg = load_config(config_file, overrides, keep_teacher=True)
        methods = methods or (PLAIN, self._own_method())
        self.methods, self.seeds = list(dict.fromkeys(methods)), list(dict.fromkeys(seeds))
        self._check_names()
        self.configs = {
            method: self._config_of(method.split(FOR_THE_TIME_OF)[0]) for method in self.methods
        }

    def _own_method(self) -> str:
        """The name of what the config itself trains."""
        model = self.cfg.model
        if model.get("peers"):
            return OWN
        if not {*(model.get("stages") or ())} - {"_target_"}:
            return START
        try:
            default = with_method(self.cfg, DEFAULT).model.stages
        except ConfigError:  # of a detector that cannot be built yet
            return OWN
        return DEFAULT if builds_the_same(default, model.stages) else OWN

    def _config_of(self, method: str) -> DictConfig:
        path, *settings = method.split(":")
        found = _config_at(path)
        if found is None:
            return with_method(self.cfg, method)
        overrides, own = self.overrides, target_of(found.model.get("teacher"))
        plain = "student" not in found.model
        paired = plain and any(x.startswith("distill.teacher=") for x in overrides)
        if not paired and own is not target_of(self.cfg.model.get("teacher")):
            # This config has another kind of teacher, or none.
            groups = ("model.teacher.", "distill.teacher=", "distill.weights=")
            overrides = [x for x in overrides if not x.lstrip("+~").startswith(groups)]
        return load_config(path, [*overrides, *settings], keep_teacher=True)

    def _check_names(self) -> None:
        if PLAIN not in self.methods:
            problem = f"has no baseline, the plain student {PLAIN}"
            raise ConfigError("--methods", ",".join(self.methods), problem, f"add {PLAIN}")
        for seed in self.seeds:
            if seed < 0:
                raise ConfigError("--seeds", seed, "is negative", "use 0 or more")
        folders: Dict[str, str] = {}
        for method in self.methods:
            trained, at, timed = method.partition(FOR_THE_TIME_OF)
            for part in (trained, timed) if at else ():
                if FOR_THE_TIME_OF in part or part not in self.methods:
                    problem = f"needs {part}, which is not listed"
                    raise ConfigError("--methods", method, problem, f"add {part}")
            other = folders.setdefault(folder_name(method), method)
            if other != method:
                problem = f"has the name of {other}"
                raise ConfigError("--methods", method, problem, "rename one of the files")

    def prepare(self) -> None:
        """Bind every method to the pair, evaluate the teacher once, and write the arms' configs."""
        model = build_parts(self.cfg).model
        teacher = getattr(model, "teacher", None)
        for method, cfg in self.configs.items():
            method = method.split(FOR_THE_TIME_OF)[0]
            if method == START or "=" in method or _config_at(method) is not None:
                check_start(build_parts(cfg))  # any part of the model may be another
            elif method != OWN and "student" in cfg.model:
                stages = construct(cfg.model.stages, "model.stages")
                student, form = model.student, model.input_format
                SharedKD(student=student, teacher=teacher, stages=stages, input_format=form)
        path = self.output / "teacher.json"
        if teacher is not None and not path.exists():
            print("the teacher's evaluation", flush=True)
            with redirect_stdout(StringIO()):  # pycocotools prints
                results = evaluate_teacher(self.cfg, model)
            write_text(path, json.dumps(results))
        del model, teacher
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the arms run in other processes
        for method in self.methods:
            if FOR_THE_TIME_OF not in method:
                self._save_config(method, self.configs[method])

    def _save_config(self, method: str, cfg: DictConfig) -> None:
        stages = (cfg.model.get("stages") or {}).values()
        ends = {stage.get("end") for stage in stages if isinstance(stage, DictConfig)}
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
            change = f"{method}, {key}={then} instead of {now}"
            problem = f"holds a comparison with other settings of {change}"
            fix = f"choose another folder, or the settings of {short(path)}"
            raise ConfigError("--output", short(self.output), problem, fix)
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
        pairs = [(seed, method) for seed in self.seeds for method in self.methods]
        for seed, method in sorted(pairs, key=lambda pair: FOR_THE_TIME_OF in pair[1]):
            folder = self.output / folder_name(method) / f"seed{seed}"
            settings = [f"train.output_dir={folder}", f"train.seed={seed}"]
            arms.append(Arm(method, seed, Run(self._config_path(method), settings, folder)))
        return arms

    def iterations(self, method: str) -> Optional[int]:
        """The number of steps of ``method``; None while it depends on unfinished runs.

        This writes the config of a method ``a@b``, once: an arm that was started must not change its
        length.  Failed runs are left out; if all are, it raises a ConfigError.
        """
        path = self._config_path(method)
        if FOR_THE_TIME_OF not in method:
            return self.configs[method].train.max_iter
        if path.exists():
            return LazyConfig.load(str(path)).train.max_iter
        both = method.split(FOR_THE_TIME_OF)
        sources = [arm for arm in self.arms if arm.method in both]
        if any(arm.status == "missing" for arm in sources):
            return None
        cfg = self.configs[method].copy()
        if not cfg.train.fast_dev_run:  # which sets a length of its own
            record = {"arms": [arm.record() for arm in sources]}
            ours, theirs = (mean_of(costs_of(record, x)["seconds_per_step"]) for x in both)
            if not math.isfinite(theirs / ours):
                problem = "has no time to take: the runs that it depends on failed"
                raise ConfigError("--methods", method, problem, "repair the failed runs")
            length = self.configs[both[1]].train.max_iter
            cfg.train.max_iter = round(length * theirs / ours)
        self._save_config(method, cfg)
        return cfg.train.max_iter

    def train(self, shard: Tuple[int, int] = (0, 1)) -> None:
        """Train the unfinished arms of a shard, i of n; a failed one does not stop the others.

        :meth:`prepare` comes before it.
        """
        if self.jobs > 1:
            self._train_in_processes(shard)  # the arms ``a@b`` are left
        mine = [
            arm
            for arm in self.arms
            if (self.methods.index(arm.method) + self.seeds.index(arm.seed)) % shard[1] == shard[0]
        ]
        live, finished = LiveLine(), sum(arm.run.finished for arm in mine)
        remaining, tried = Remaining(len(mine) - finished), 0
        for number, arm in enumerate(mine, start=1):
            title = f"[{number}/{len(mine)}] {arm.method}, seed {arm.seed}"
            if arm.run.finished:
                print(f"{title}: already finished", flush=True)
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
        """Write results.json, report.md and the plots; return the record, see :mod:`~.scores`."""
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
        write(record, str(self.output))
        return record

    def run(self, shard: Tuple[int, int] = (0, 1)) -> Dict[str, Any]:
        """Train, then :meth:`report`, also for TensorBoard; return that record."""
        self.train(shard)
        record = self.report()
        try:
            write_events(self.output, record)
        except OSError as e:  # a full disk
            print(f"nothing for TensorBoard: {e}", flush=True)
        return record

    def command(
        self,
        what: Sequence[str] = (),
        output: Optional[Path] = None,
        overrides: Optional[Sequence[str]] = None,
    ) -> List[str]:
        """The command line of this comparison, or of one of students, which ``what`` names."""
        return [
            *tool("compare_methods.py", self.root),
            *(what or ("--config-file", short(self.config_file))),
            *("--methods", ",".join(self.methods)),
            *("--seeds", ",".join(map(str, self.seeds))),
            *("--output", short(output or self.output)),
            *(("--jobs", str(self.jobs)) if self.jobs > 1 else ()),
            *(self.overrides if overrides is None else overrides),
        ]


def _config_at(path: str) -> Optional[DictConfig]:
    """The config that a method is the path of; None if it is no path, or a recipe's, which has no model."""
    if not (path.endswith(".py") and os.path.isfile(path)):
        return None
    found = load_file(path, "--methods")
    return found if "model" in found else None


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
