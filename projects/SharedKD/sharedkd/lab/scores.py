"""Scores of a comparison of methods: means over seeds, their intervals, paired differences.

All functions but :func:`read_comparison` take one record, a plain dict as ``results.json`` holds it:

* "methods": names in the order of the report; "a@b" is method a trained for the time of method b;
* "baseline": the method that the others are compared with;
* "arms": one mapping per training run, with "method", "seed" and "status" ("finished", "failed" or
  "missing").  A finished one has "results" (task "bbox" or "segm" to metric name to percentage) and
  may have "curve" (task to [iteration, AP] of each evaluation), "iterations", "seconds_per_step",
  "gradient_share" (of the distillation losses, at the student's parameters),
  "peak_memory_mb", "parameters" ("student", "losses"), "initial_weights" (a digest),
  "inherited" (how many tensors are the teacher's at the start), "hardware",
  "versions" and "collapsed" (tasks in which it finds nothing, so that its AP is zero); the others
  may have "error";
* optionally "teacher", its results; "config_file", "overrides", "command", and "configs": method to its config.

A value that is NaN or None counts as one that is not there.
"""

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from scipy.stats import t

from sharedkd.errors import ConfigError

__all__ = [
    "CONFIDENCE",
    "MORE_METRICS",
    "Record",
    "TASKS",
    "Difference",
    "Row",
    "costs_of",
    "difference",
    "curve_of",
    "finished_arms",
    "folder_name",
    "gains",
    "gap_closed",
    "interval",
    "is_known",
    "level",
    "mean_of",
    "measured",
    "reached",
    "read_comparison",
    "rows_of",
    "score_of",
    "scores_of",
    "tasks_of",
    "text_of",
    "texts_of",
]

CONFIDENCE = 0.95  #: of every interval
TASKS = {"bbox": "box", "segm": "mask"}  #: as Detectron2's evaluator calls them -> in words
MORE_METRICS = ("AP50", "AP75", "APs", "APm", "APl")
Record = Mapping[str, Any]
_OVER_SEEDS = ("worse", "better", "seed")


def read_comparison(folder: Path, key: str) -> Dict[str, Any]:
    """Read the record of the comparison in ``folder``, which the user named by ``key``."""
    path = folder / "results.json"
    if not path.is_file():
        raise ConfigError(key, folder, "holds no comparison", "name the folder of one")
    try:
        record = json.loads(path.read_text())
    except ValueError as e:
        raise ConfigError(key, path, f"cannot be read: {e}", "compare once more") from e
    if not isinstance(record, dict) or not {"arms", "baseline", "methods"} <= record.keys():
        raise ConfigError(key, path, "is not of a comparison", "name the folder of one")
    return record


def folder_name(method: str) -> str:
    """``method`` without the directories of recipes and values, as the value of an override can hold it.

    >>> folder_name("configs/schemes/average.py"), folder_name("inherit:data.train_json=[a/few.json,b/more.json]")
    ('average', 'inherit:data.train_json-[few.json,more.json]')
    """
    name = re.sub(r"[^@+:=\[,]*/([^@+:/,\]]+?)(\.py)?(?=[@+:,\]]|$)", r"\1", method)
    return name.replace("=", "-")


def interval(values: Sequence[float]) -> Tuple[float, float]:
    """Student's t interval of the mean of independent values.

    Returns:
        The mean and the half width of the interval.  Of one value the half width is NaN, of none or
        with a NaN both are.

    >>> "%.3f +- %.3f" % interval([1.0, 2.0, 3.0])
    '2.000 +- 2.484'
    """
    if len(values) == 0:
        return math.nan, math.nan
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, math.nan
    quantile = t.ppf((1 + CONFIDENCE) / 2, df=len(values) - 1)
    return mean, float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, with its 95 % t interval."""

    mean: float  #: positive where ours has more than the reference
    half_width: float  #: of the interval; NaN with fewer than two values
    count: int  #: of the values: seeds, images or minibatches that both have
    #: The verdicts on a mean below and above zero, and what was counted.
    words: Tuple[str, str, str] = _OVER_SEEDS

    @classmethod
    def of(cls, values: Iterable[float], words: Tuple[str, str, str] = _OVER_SEEDS) -> "Difference":
        """Of the single differences; a NaN is left out."""
        known = [x for x in values if is_known(x)]
        return cls(*interval(known), len(known), words)

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def verdict(self) -> str:
        """In words; the mean is below or above zero only where the interval excludes zero."""
        below, above, counted = self.words
        if self.count < 2:
            return f"one {counted}: no interval" if self.count else f"no common {counted}"
        if self.low > 0:
            return above
        return below if self.high < 0 else "no difference shown"

    def record(self) -> Dict[str, Any]:
        """For JSON: "mean", "low", "high", "count" and "verdict"."""
        return {x: getattr(self, x) for x in ("mean", "low", "high", "count", "verdict")}


def difference(
    record: Record, method: str, reference: str, task: str, metric: str = "AP"
) -> Difference:
    """``method`` minus ``reference``, paired over the seeds that both have."""
    return Difference.of(gains(record, method, reference, task, metric).values())


def gains(
    record: Record, method: str, reference: str, task: str, metric: str = "AP"
) -> Dict[int, float]:
    """Seed -> ``method`` minus ``reference``, of the seeds that both have."""
    ours, theirs = (scores_of(record, name, task, metric) for name in (method, reference))
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


@dataclass(frozen=True)
class Row:
    """The measurements of one method on one task."""

    method: str
    scores: Mapping[str, Sequence[float]]  #: metric -> its known values, one per seed
    gain: Optional[Difference] = None  #: against the baseline; None for the baseline itself
    costs: Mapping[str, Sequence[float]] = field(default_factory=dict)  #: see :func:`costs_of`

    def interval(self, metric: str = "AP") -> Tuple[float, float]:
        """Mean and half width over seeds, see :func:`interval`."""
        return interval(self.scores[metric])

    def mean(self, metric: str = "AP") -> float:
        return mean_of(self.scores[metric])

    def cost(self, name: str) -> float:
        """The mean of one of the costs; NaN if it is not known."""
        return mean_of(self.costs.get(name, ()))


def measured(record: Record) -> Dict[str, List[Row]]:
    """One row per method, for each task ("bbox", "segm") that ``record`` has results of."""
    return {task: rows_of(record, task) for task in tasks_of(record)}


def rows_of(record: Record, task: str) -> List[Row]:
    """One row per method of ``record``."""
    rows, baseline = [], record["baseline"]
    for method in record["methods"]:
        scores = {m: [*scores_of(record, method, task, m).values()] for m in ("AP", *MORE_METRICS)}
        gain = None if method == baseline else difference(record, method, baseline, task)
        rows.append(Row(method, scores, gain, costs_of(record, method)))
    return rows


def finished_arms(record: Record) -> List[Mapping[str, Any]]:
    """The arms of ``record`` that were trained and evaluated."""
    return [arm for arm in record["arms"] if arm["status"] == "finished"]


def _finished_of(record: Record, method: str) -> List[Mapping[str, Any]]:
    return [arm for arm in finished_arms(record) if arm["method"] == method]


def texts_of(arms: Iterable[Mapping[str, Any]], key: str) -> List[str]:
    """What ``arms`` say of "hardware", "versions" or the like, each once, in words."""
    return list(dict.fromkeys(text_of(arm[key]) for arm in arms if arm.get(key)))


def text_of(value: Any) -> str:
    """A text, or the items of a mapping such as versions."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in sorted(value.items()))
    return str(value)


def is_known(value: Optional[float]) -> bool:
    """Whether ``value`` is there: neither None nor NaN nor infinite."""
    return value is not None and math.isfinite(value)


def score_of(results: Optional[Mapping[str, Any]], task: str, metric: str = "AP") -> float:
    """``metric`` of ``task`` in an arm's or the teacher's ``results``; NaN where they lack it."""
    value = ((results or {}).get(task) or {}).get(metric)
    return value if is_known(value) else math.nan


def scores_of(record: Record, method: str, task: str, metric: str = "AP") -> Dict[int, float]:
    """Seed to ``metric`` of ``method`` on ``task``, of the seeds in ``record`` that have it."""
    arms = _finished_of(record, method)
    scores = {arm["seed"]: score_of(arm.get("results"), task, metric) for arm in arms}
    return {seed: score for seed, score in scores.items() if is_known(score)}


def tasks_of(record: Record) -> List[str]:
    """The tasks that a finished arm of ``record`` was evaluated on."""
    results = [arm.get("results") or {} for arm in finished_arms(record)]
    return [task for task in TASKS if any(result.get(task) for result in results)]


def costs_of(record: Record, method: str) -> Dict[str, List[float]]:
    """Each cost of ``method`` with its known values, one per finished arm.

    They are "iterations", "seconds_per_step", "minutes" (of these two), "peak_memory_mb", "gradient_share", and
    "loss_parameters" and "student_parameters", their numbers.
    """
    costs: Dict[str, List[float]] = defaultdict(list)
    for arm in _finished_of(record, method):
        steps, seconds, sizes = (
            arm.get(x) for x in ("iterations", "seconds_per_step", "parameters")
        )
        values = {
            "iterations": steps,
            "seconds_per_step": seconds,
            "minutes": steps * seconds / 60 if is_known(steps) and is_known(seconds) else None,
            "peak_memory_mb": arm.get("peak_memory_mb"),
            "gradient_share": arm.get("gradient_share"),
            "loss_parameters": (sizes or {}).get("losses"),
            "student_parameters": (sizes or {}).get("student"),
        }
        for name, value in values.items():
            if is_known(value):
                costs[name].append(value)
    return costs


def curve_of(record: Record, method: str, task: str) -> List[Tuple[int, float]]:
    """(iteration, mean AP) of the evaluations that all finished arms of ``method`` have."""
    arms = [dict((arm.get("curve") or {}).get(task, [])) for arm in _finished_of(record, method)]
    common = sorted(set.intersection(*(set(x) for x in arms))) if arms else []
    return [(i, mean_of([arm[i] for arm in arms])) for i in common]


def gap_closed(record: Record, method: str, task: str) -> float:
    """The share of the baseline's distance to the teacher's AP that ``method`` gains.

    NaN without a teacher's AP, or if the teacher has no more than the baseline.
    """
    plain = mean_of(scores_of(record, record["baseline"], task).values())
    gap = score_of(record.get("teacher"), task) - plain
    return difference(record, method, record["baseline"], task).mean / gap if gap > 0 else math.nan


def reached(record: Record, method: str, task: str) -> List[Optional[int]]:
    """Per seed, the first evaluated iteration with the baseline's final AP; None: never."""
    goals = scores_of(record, record["baseline"], task)
    found = []
    for arm in _finished_of(record, method):
        curve, goal = (arm.get("curve") or {}).get(task), goals.get(arm["seed"])
        if curve and goal is not None:
            found.append(next((i for i, ap in curve if ap >= goal), None))
    return found


def level(record: Record, method: str) -> Dict[int, int]:
    """Seed -> the first evaluated iteration with at least the teacher's AP in every task, if there is one."""
    theirs = {task: score_of(record.get("teacher"), task) for task in tasks_of(record)}
    goals = {task: ap for task, ap in theirs.items() if is_known(ap) and ap > 0}
    found = {}
    for arm in _finished_of(record, method) if goals else ():
        curves = [dict((arm.get("curve") or {}).get(task, ())) for task in goals]
        for i in sorted(set.intersection(*map(set, curves))):
            if all(curve[i] >= goal for curve, goal in zip(curves, goals.values())):
                found[arm["seed"]] = i
                break
    return found


def mean_of(values: Iterable[float]) -> float:
    """The mean of ``values``; NaN of none."""
    return interval([*values])[0]
