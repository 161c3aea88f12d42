"""What a report is made from: the files of a run, of a comparison, or of a folder of runs."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np

from sharedkd.config.plain import read_plain
from sharedkd.engine.hooks.record import read_record
from sharedkd.errors import ConfigError
from sharedkd.lab.analysis.pictures import read_curves
from sharedkd.lab.compare.comparison import folder_name
from sharedkd.lab.scores import read_comparison

__all__ = ["RunData", "Source", "is_distilled", "read_source"]

_TASKS = ("bbox", "segm")


@dataclass
class RunData:
    """One training run.

    Args:
        method, seed: which arm it is.
        folder: its output folder.
        record: its run.json; empty if there is none.
        curves: its metrics.json, see :func:`~.pictures.read_curves`; empty if there is none.
        config: its config.yaml as plain values, references unresolved; None if there is none.
    """

    method: str
    seed: int
    folder: Path
    record: Mapping[str, Any]
    curves: Mapping[str, np.ndarray]
    config: Optional[Mapping[str, Any]]

    @property
    def iterations_done(self) -> int:
        """How many its metrics tell of."""
        steps = self.curves.get("iteration", np.array([]))
        losses = self.curves.get("total_loss", np.full(len(steps), np.nan))
        done = steps[~np.isnan(losses)]
        return int(done[-1]) + 1 if len(done) else 0

    @property
    def max_iter(self) -> Optional[int]:
        """Of its config, without which its record has it once it is finished."""
        return self._train.get("max_iter") or self.record.get("iterations")

    @property
    def is_trial(self) -> bool:
        """Whether train.fast_dev_run cut it short."""
        return bool(self._train.get("fast_dev_run"))

    @property
    def was_moved(self) -> bool:
        """Whether its folder is not the one that its config names."""
        return Path(self._train.get("output_dir") or self.folder).resolve() != self.folder.resolve()

    @property
    def _train(self) -> Mapping[str, Any]:
        return (self.config or {}).get("train") or {}


@dataclass
class Source:
    """All that a report tells of.

    Args:
        folder: the one that was named.
        kind: "comparison", "runs" (a folder of them, one seed each) or "run".
        record: as :mod:`sharedkd.lab.scores` describes it.
        runs: of the arms that have a folder.
        configs: method to its config; methods without one are not there.
    """

    folder: Path
    kind: str
    record: Mapping[str, Any]
    runs: List[RunData]
    configs: Dict[str, Mapping[str, Any]]

    @property
    def is_single(self) -> bool:
        """Whether there is one run, and nothing to compare it with but its teacher."""
        return self.kind != "comparison" and len(self.runs) == 1

    def runs_of(self, method: str) -> List[RunData]:
        """Runs of ``method`` whose curves can be averaged: finished ones, or all while none is."""
        runs = [run for run in self.runs if run.method == method and len(run.curves)]
        return [run for run in runs if _results(run)] or runs


def read_source(folder: Path) -> Source:
    """Read ``folder``: that of a run or a comparison, or one with runs right below it.

    Raises:
        ConfigError: there is nothing to report in it, or its results.json is torn.
    """
    if (folder / "results.json").is_file():
        return _comparison(folder)
    inner = [path for path in sorted(folder.glob("*/")) if _is_run(path)]
    # An evaluation alone leaves a config.yaml, too, perhaps in the folder that holds the runs.
    if _has_trained(folder) or (_is_run(folder) and not inner):
        name = folder.resolve().name
        return _of_runs(folder, "run", [_run(folder, name, None)])
    runs = [_run(path, path.name, None) for path in inner]
    if not runs:
        raise ConfigError(
            "DIR",
            folder,
            "holds neither a run nor a comparison",
            "name the train.output_dir of a run, or the --output of tools/compare_methods.py",
        )
    return _of_runs(folder, "runs", runs)


def is_distilled(config: Optional[Mapping[str, Any]]) -> bool:
    """Whether ``config`` is of a pair; not that of a plain detector, and not None."""
    model = (config or {}).get("model")
    return isinstance(model, Mapping) and "student" in model and "stages" in model


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
    configs = {m: c for m, c in record["configs"].items() if c}
    for run in runs:
        if run.config:
            configs.setdefault(run.method, run.config)
    return Source(folder, "comparison", record, runs, configs)


def _of_runs(folder: Path, kind: str, runs: List[RunData]) -> Source:
    """A run, or several, told as a comparison with one seed each; their teacher is none of them."""
    found = (_teacher_of(run, runs) for run in runs)
    teacher = next(filter(None, found), None)
    arms = [run for run in runs if run is not teacher]
    plain = [run.method for run in arms if not is_distilled(run.config)]
    record = {
        "methods": [run.method for run in arms],
        "baseline": (plain or [arms[0].method])[0],
        "teacher": _results(teacher) if teacher else None,
        "arms": [_arm(run) for run in arms],
    }
    configs = {run.method: run.config for run in arms if run.config}
    return Source(folder, kind, record, arms, configs)


def _teacher_of(run: RunData, runs: Sequence[RunData]) -> Optional[RunData]:
    """The one of the runs that is its teacher; if they were moved, the one of that folder's name."""
    teacher = ((run.config or {}).get("model") or {}).get("teacher")
    weights = teacher.get("weights") if isinstance(teacher, Mapping) else None
    if not isinstance(weights, str):
        return None
    folder = Path(weights).resolve().parent
    others = [other for other in runs if other is not run]
    same = [other for other in others if other.folder.resolve() == folder]
    return next(iter(same or [other for other in others if other.folder.name == folder.name]), None)


def _arm(run: RunData) -> Dict[str, Any]:
    results = _results(run)
    times = run.curves.get("time", np.array([]))
    times = times[~np.isnan(times)]
    return {
        "method": run.method,
        "seed": run.seed,
        "iterations": run.iterations_done or None,
        **run.record,
        "status": "finished" if results else "missing",
        "results": results,
        "seconds_per_step": float(np.median(times)) if len(times) else math.nan,
    }


def _results(run: RunData) -> Dict[str, Dict[str, float]]:
    """Of its last evaluation, which metrics.json has, too; empty before one."""
    if run.record.get("results"):
        return run.record["results"]
    found: Dict[str, Dict[str, float]] = {}
    for key, values in run.curves.items():
        task, _, metric = key.partition("/")
        known = values[~np.isnan(values)]
        if task in _TASKS and len(known):
            found.setdefault(task, {})[metric] = float(known[-1])
    return found


def _run(folder: Path, method: str, seed: Optional[int]) -> RunData:
    metrics = folder / "metrics.json"
    curves = read_curves(str(metrics)) if metrics.is_file() else {}
    config = read_plain(folder / "config.yaml")
    if seed is None:
        seed = ((config or {}).get("train") or {}).get("seed") or 0
    return RunData(method, seed, folder, read_record(folder), curves, config)
