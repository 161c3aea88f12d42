"""Reads the files of a report: of a run, of a comparison, or of a folder of runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np

from sharedkd.config.plain import read_plain
from sharedkd.engine.hooks.record import read_record
from sharedkd.errors import ConfigError
from sharedkd.lab.metrics import read_metrics, seconds_per_step
from sharedkd.lab.scores import TASKS, Record, folder_name, read_comparison
from sharedkd.modeling.stages import TIMES, Stage

__all__ = ["RunData", "Source", "is_distilled", "read_source"]


@dataclass
class RunData:
    """The files of one training run; of one that is not there, nothing."""

    method: str
    seed: int
    folder: Path
    record: Mapping[str, Any] = field(default_factory=dict)  #: run.json
    curves: Mapping[str, np.ndarray] = field(default_factory=dict)  #: metrics.json
    config: Optional[Mapping[str, Any]] = None  #: config.yaml, references unresolved
    problems: List[str] = field(default_factory=list)  #: what could not be read, a sentence each

    @property
    def iterations_done(self) -> int:
        """The number of iterations that its metrics cover."""
        steps = self.curves.get("iteration", np.array([]))
        done = steps[~np.isnan(self.curves.get("total_loss", np.full(len(steps), np.nan)))]
        return int(done[-1]) + 1 if len(done) else 0

    @property
    def max_iter(self) -> Optional[int]:
        """The length by its config; if that has a reference or is missing, by a finished run's record."""
        value = self.train.get("max_iter")
        return value if isinstance(value, int) else self.record.get("iterations")

    @property
    def train(self) -> Mapping[str, Any]:
        """Its config's ``train``."""
        return _inner(self.config, "train")

    @property
    def results(self) -> Dict[str, Dict[str, float]]:
        """Task to metrics of the last evaluation, which metrics.json has, too; empty before one."""
        if self.record.get("results"):
            return self.record["results"]
        found: Dict[str, Dict[str, float]] = {}
        for key, values in self.curves.items():
            task, _, metric = key.partition("/")
            known = values[~np.isnan(values)]
            if task in TASKS and len(known):
                found.setdefault(task, {})[metric] = float(known[-1])
        return found

    @property
    def stages(self) -> Dict[str, Stage]:
        """Its config's stages by name, with their schedules and without their losses."""
        found = {}
        nodes = _inner(self.config["model"], "stages") if is_distilled(self.config) else {}
        for name, node in nodes.items():
            if not isinstance(node, Mapping):  # the dict's own _target_
                continue
            keys = ("weight", "share", *TIMES)
            times = {key: node[key] for key in keys if key in node}
            # Other text is a reference to another key.
            words = {("weight", "auto"), ("end", "teacher")}
            level = (self.record.get("outgrown") or {}).get(node.get("teacher") or "teacher")
            if times.get("end") == "teacher" and level is not None:
                times["end"] = level + 1
            if all(not isinstance(x, str) or (k, x) in words for k, x in times.items()):
                found[str(name)] = Stage(None, **times)  # type: ignore[arg-type]
        return found


@dataclass
class Source:
    """The runs of a report."""

    folder: Path  #: that the user named
    kind: str  #: "comparison", "runs" (a folder of them, one seed each) or "run"
    record: Record  #: as :mod:`sharedkd.lab.scores` describes it
    runs: List[RunData]  #: of the arms that have a folder
    configs: Mapping[str, Mapping[str, Any]]  #: of the methods that have one

    @property
    def is_single(self) -> bool:
        """Whether there is one run, and nothing to compare it with but its teacher."""
        return self.kind != "comparison" and len(self.runs) == 1

    def runs_of(self, method: str) -> List[RunData]:
        """Runs of ``method`` whose curves can be averaged: finished ones, or all while none is."""
        runs = [run for run in self.runs if run.method == method and len(run.curves)]
        return [run for run in runs if run.results] or runs


def read_source(folder: Path) -> Source:
    """Read ``folder``: that of a run or a comparison, or one with runs right below it."""
    if (folder / "results.json").is_file():
        return _comparison(folder)
    inner = [path for path in sorted(folder.glob("*/")) if _is_run(path)]
    # An evaluation alone leaves a config.yaml, too, perhaps in the folder that holds the runs.
    if _has_trained(folder) or (_is_run(folder) and not inner):
        return _of_runs(folder, "run", [_run(folder, folder.resolve().name)])
    if not inner:
        fix = "name the train.output_dir of a run, or the --output of tools/compare_methods.py"
        raise ConfigError("DIR", folder, "holds neither a run nor a comparison", fix)
    return _of_runs(folder, "runs", [_run(path, path.name) for path in inner])


def is_distilled(config: Optional[Mapping[str, Any]]) -> bool:
    """Whether ``config`` is of a pair; not that of a plain detector, and not None."""
    return {"student", "stages"} <= _inner(config, "model").keys()


def _inner(config: Optional[Mapping[str, Any]], key: str) -> Mapping[str, Any]:
    value = (config or {}).get(key)
    return value if isinstance(value, Mapping) else {}


def _is_run(folder: Path) -> bool:
    return _has_trained(folder) or (folder / "config.yaml").is_file()


def _has_trained(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("metrics.json", "run.json"))


def _comparison(folder: Path) -> Source:
    record = read_comparison(folder, "DIR")
    # Recipes are known by their names here, whatever folder they are from.
    record["methods"] = [folder_name(method) for method in record["methods"]]
    record["configs"] = {folder_name(m): c for m, c in (record.get("configs") or {}).items()}
    runs = []
    for arm in record["arms"]:
        arm["method"] = folder_name(arm["method"])
        path = folder / arm["method"] / f"seed{arm['seed']}"
        if _is_run(path):
            runs.append(_run(path, arm["method"], arm["seed"]))
    configs = {run.method: run.config for run in reversed(runs) if run.config}
    configs.update({m: c for m, c in record["configs"].items() if c})
    return Source(folder, "comparison", record, runs, configs)


def _of_runs(folder: Path, kind: str, runs: List[RunData]) -> Source:
    """A run, or several, as a comparison with one seed each; their teacher is no method."""
    teacher = next(filter(None, (_teacher_of(run, runs) for run in runs)), None)
    arms = [run for run in runs if run is not teacher]
    plain = [run.method for run in arms if not is_distilled(run.config)]
    record = {
        "methods": [run.method for run in arms],
        "baseline": (plain or [arms[0].method])[0],
        "teacher": teacher.results if teacher else None,
        "arms": [_arm(run) for run in arms],
    }
    configs = {run.method: run.config for run in arms if run.config}
    return Source(folder, kind, record, arms, configs)


def _teacher_of(run: RunData, runs: Sequence[RunData]) -> Optional[RunData]:
    """Its teacher among ``runs``; if they were moved, the run with the name of that folder."""
    weights = _inner(_inner(run.config, "model"), "teacher").get("weights")
    if not isinstance(weights, str):
        return None
    folder = Path(weights).resolve().parent
    others = [other for other in runs if other is not run]
    same = [other for other in others if other.folder.resolve() == folder]
    return next(iter(same or [other for other in others if other.folder.name == folder.name]), None)


def _arm(run: RunData) -> Dict[str, Any]:
    return {
        "iterations": run.iterations_done or None,
        **run.record,
        "method": run.method,
        "seed": run.seed,
        "status": "finished" if run.results else "missing",
        "results": run.results,
        "seconds_per_step": seconds_per_step(run.curves),
    }


def _run(folder: Path, method: str, seed: int = 0) -> RunData:
    """Read a run's folder; a file that cannot be read is reported, and the others are used."""
    run = RunData(method, seed, folder, config=read_plain(folder / "config.yaml"))
    broken, tell = 0, run.problems.append
    if (folder / "metrics.json").is_file():
        run.curves, broken = read_metrics(str(folder / "metrics.json"))
    else:
        tell("there is no metrics.json, so it has no curves.")
    if broken:
        tell(f"{broken} line(s) of metrics.json cannot be read and are left out.")
    try:
        run.record = read_record(folder)
    except ConfigError as e:
        tell(f"{e}.")
    if run.config is None:
        tell("config.yaml is missing or cannot be read, so its settings are unknown.")
    return run
