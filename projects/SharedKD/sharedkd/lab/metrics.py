"""Reads the curves of a run: Detectron2's metrics.json."""

import json
import math
from typing import Dict, Mapping, Optional, Tuple

import numpy as np

__all__ = ["detector_loss", "gradient_share", "read_curves", "read_metrics", "seconds_per_step"]


def read_curves(path: str) -> Dict[str, np.ndarray]:
    """Read Detectron2's ``metrics.json`` at ``path``, one JSON object per line.

    Lines that a killed run left cut off are skipped.  Where a resumed run repeats an iteration, its
    later values stand.

    Returns:
        Metric name to values of shape (rows,), NaN where a row lacks the metric.  "iteration" is
        among the names, and rising.
    """
    return read_metrics(path)[0]


def read_metrics(path: str) -> Tuple[Dict[str, np.ndarray], int]:
    """What :func:`read_curves` returns of ``path``, and how many lines of it cannot be read."""
    rows: Dict[int, Dict[str, float]] = {}
    broken = 0
    with open(path, errors="replace") as file:
        for line in filter(str.strip, file):
            row = _row(line)
            if row:
                rows.setdefault(int(row["iteration"]), {}).update(row)
            else:
                broken += 1
    ordered = [rows[iteration] for iteration in sorted(rows)]
    names = {"iteration"}.union(*ordered)
    curves = {name: np.array([row.get(name, np.nan) for row in ordered], float) for name in names}
    return curves, broken


def _row(line: str) -> Optional[Dict[str, float]]:
    """The numbers of one line; None if it holds anything else, or no iteration."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("iteration"), int):
        return None
    return row if all(isinstance(x, (int, float, type(None))) for x in row.values()) else None


def seconds_per_step(curves: Mapping[str, np.ndarray]) -> float:
    """The median of a run's step times; NaN before its first logged step."""
    times = curves.get("time", np.array([]))
    times = times[~np.isnan(times)]
    return float(np.median(times)) if len(times) else math.nan


def gradient_share(curves: Mapping[str, np.ndarray]) -> float:
    """The mean share of the student's gradient that distillation has, see Watchdog; NaN if it was not measured."""
    shares = 1 - curves.get("watch/detector", np.array([]))
    shares = shares[~np.isnan(shares)]
    return float(np.mean(shares)) if len(shares) else math.nan


def detector_loss(curves: Mapping[str, np.ndarray]) -> np.ndarray:
    """The sum of the loss terms other than distillation: shape (rows,), NaN where one is NaN.

    ``curves`` is what :func:`read_curves` returned; without such a term all is NaN.
    """
    terms = [
        values
        for name, values in curves.items()
        if name.startswith("loss_") and not name.startswith("loss_distill")
    ]
    return np.sum(terms, axis=0) if terms else np.full(len(curves["iteration"]), np.nan)
