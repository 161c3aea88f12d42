"""Bar charts of detections.json: AP per class and size, and the kinds of mistakes.

The record is a plain dict: "tasks" names what was evaluated ("bbox", "segm"); "models" maps a name
to its results, which have for each task AP, AP50, AP75, APs, APm, APl, "classes" (name -> AP), and
"mistakes" with "counts" and "costs", see :func:`~.detections.mistakes`; "score_threshold" is that
of the counts.  None and NaN are values that are not there.
"""

from typing import Any, Dict, Mapping, Optional, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sharedkd.lab.scores import TASKS

from .mistakes import KINDS

__all__ = ["draw_ap", "draw_mistakes"]

# Of Okabe and Ito's palette, which people with any colour vision can tell apart.
_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SIZES = {"AP": "all", "APs": "small", "APm": "medium", "APl": "large"}
_MOST = 20  # classes with bars; the json has all
_DPI = 110


def draw_ap(record: Mapping[str, Any], path: Optional[str] = None) -> Figure:
    """Draw AP, a row per task: by size left, by class right (of many classes those that differ most).

    Args:
        record: as the module describes it.
        path: the picture to write, in the format of its ending; None: none is written.
    """
    tasks = record["tasks"]
    figure = Figure(figsize=(13, 3.6 * len(tasks)), layout="constrained")
    for (left, right), task in zip(
        figure.subplots(len(tasks), 2, squeeze=False, width_ratios=(1, 2)), tasks
    ):
        results = {name: model[task] for name, model in record["models"].items()}
        _bars(left, {n: {t: r[k] for k, t in _SIZES.items()} for n, r in results.items()})
        classes = {name: result["classes"] for name, result in results.items()}
        shown = _shown(classes)
        _bars(right, {n: {c: values[c] for c in shown} for n, values in classes.items()})
        left.set_title(f"{TASKS[task]} AP by size")
        more = f" ({len(shown)} that differ most)" if len(shown) == _MOST else ""
        right.set_title(f"{TASKS[task]} AP by class{more}")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center")
    if path:
        figure.savefig(path, dpi=_DPI)
    return figure


def draw_mistakes(record: Mapping[str, Any], path: Optional[str] = None) -> Figure:
    """Draw mistakes, a row per task: the cost of each kind in AP50 left, counts right.

    Args:
        record: as the module describes it.
        path: the picture to write, in the format of its ending; None: none is written.
    """
    tasks = record["tasks"]
    figure = Figure(figsize=(13, 3.6 * len(tasks)), layout="constrained")
    for (left, right), task in zip(figure.subplots(len(tasks), 2, squeeze=False), tasks):
        found = {name: model[task]["mistakes"] for name, model in record["models"].items()}
        _bars(left, {name: x["costs"] for name, x in found.items()}, ".1f")
        _bars(
            right, {n: {k: x["counts"][k] for k in ("correct", *KINDS)} for n, x in found.items()}
        )
        left.set_title(f"{TASKS[task]}: points of AP50 that each kind of mistake costs")
        right.set_title(f"{TASKS[task]}: counts, scores of at least {record['score_threshold']:g}")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center")
    if path:
        figure.savefig(path, dpi=_DPI)
    return figure


def _shown(classes: Mapping[str, Mapping[str, Optional[float]]]) -> Sequence[str]:
    names = list(next(iter(classes.values())))
    if len(names) <= _MOST:
        return names
    values = np.array([[x[n] for n in names] for x in classes.values()], float)
    spread = np.nan_to_num(values.max(0) - values.min(0), nan=-1)
    return [names[i] for i in sorted(np.argsort(-spread, kind="stable")[:_MOST])]


def _bars(axes: Axes, groups: Mapping[str, Dict[str, Optional[float]]], style: str = ".0f") -> None:
    """A group of bars per label, a bar per model; one container per model."""
    labels = list(next(iter(groups.values())))
    at, width = np.arange(len(labels)), 0.8 / len(groups)
    for i, (name, values) in enumerate(groups.items()):
        heights = np.array([values[label] for label in labels], float)
        offset = (i - (len(groups) - 1) / 2) * width
        color = _COLORS[i % len(_COLORS)]
        bars = axes.bar(at + offset, np.nan_to_num(heights), width * 0.92, color=color, label=name)
        if len(labels) * len(groups) <= 40:
            texts = ["-" if np.isnan(h) else f"{h:{style}}" for h in heights]
            axes.bar_label(bars, texts, fontsize=6.5, padding=1)
    turned: Dict[str, Any] = dict(rotation=35, ha="right") if len(labels) > 5 else {}
    axes.set_xticks(at, labels, fontsize="small", **turned)
    axes.margins(y=0.12)
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
