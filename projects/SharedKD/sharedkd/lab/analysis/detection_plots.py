"""Bar charts of detections.json: AP per class and size, and the kinds of mistakes.

The record is a plain dict: "tasks" names what was evaluated ("bbox", "segm"); "models" maps a name
to its results, which have for each task AP, AP50, AP75, APs, APm, APl, "classes" (name -> AP), and
"mistakes" with "counts" and "costs", see :func:`~.detections.mistakes`; "score_threshold" is that
of the counts.  None and NaN are values that are not there.
"""

from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sharedkd.lab.compare.plots import PALETTE
from sharedkd.lab.scores import TASKS

__all__ = ["draw_ap", "draw_mistakes"]

_SIZES = {"AP": "all", "APs": "small", "APm": "medium", "APl": "large"}
_MOST = 20  # classes with bars; the json has all

Groups = Mapping[str, Dict[str, Optional[float]]]  #: model -> label -> value


def draw_ap(record: Mapping[str, Any]) -> Figure:
    """Draw AP, a row per task: by size left, by class right (of many classes those that differ most)."""
    rows = []
    for task in record["tasks"]:
        models = {name: model[task] for name, model in record["models"].items()}
        sizes = {n: {title: x[key] for key, title in _SIZES.items()} for n, x in models.items()}
        shown = _shown([model["classes"] for model in models.values()])
        classes = {n: {c: x["classes"][c] for c in shown} for n, x in models.items()}
        more = f" ({len(shown)} that differ most)" if len(shown) == _MOST else ""
        title = f"{TASKS[task]} AP by"
        rows.append([(f"{title} size", sizes, ".0f"), (f"{title} class{more}", classes, ".0f")])
    return _draw(rows, (1, 2))


def draw_mistakes(record: Mapping[str, Any]) -> Figure:
    """Draw mistakes, a row per task: the cost of each kind in AP50 left, counts right."""
    rows = []
    for task in record["tasks"]:
        found = {name: model[task]["mistakes"] for name, model in record["models"].items()}
        costs, counts = ({n: x[key] for n, x in found.items()} for key in ("costs", "counts"))
        threshold = f"counts, scores of at least {record['score_threshold']:g}"
        title = f"{TASKS[task]}: points of AP50 that each kind of mistake costs"
        rows.append([(title, costs, ".1f"), (f"{TASKS[task]}: {threshold}", counts, ".0f")])
    return _draw(rows, (1, 1))


def _draw(rows: Sequence[Sequence[Tuple[str, Groups, str]]], widths: Tuple[int, int]) -> Figure:
    figure = Figure(figsize=(13, 3.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False, width_ratios=widths)
    for axes, (title, groups, style) in zip(grid.flat, (panel for row in rows for panel in row)):
        _bars(axes, groups, style)
        axes.set_title(title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def _shown(classes: Sequence[Mapping[str, Optional[float]]]) -> Sequence[str]:
    names = list(classes[0])
    if len(names) <= _MOST:
        return names
    values = np.array([[x[n] for n in names] for x in classes], float)
    spread = np.nan_to_num(values.max(0) - values.min(0), nan=-1)
    return [names[i] for i in sorted(np.argsort(-spread, kind="stable")[:_MOST])]


def _bars(axes: Axes, groups: Groups, style: str) -> None:
    """A group of bars per label, a bar per model."""
    labels = list(next(iter(groups.values())))
    at, width = np.arange(len(labels)), 0.8 / len(groups)
    for i, (name, values) in enumerate(groups.items()):
        heights = np.array(list(values.values()), float)
        place = at + (i - (len(groups) - 1) / 2) * width
        color = PALETTE[i % len(PALETTE)]
        bars = axes.bar(place, np.nan_to_num(heights), width * 0.92, color=color, label=name)
        if len(labels) * len(groups) <= 40:
            texts = ["-" if np.isnan(h) else f"{h:{style}}" for h in heights]
            axes.bar_label(bars, texts, fontsize=6.5, padding=1)
    turned: Dict[str, Any] = dict(rotation=35, ha="right") if len(labels) > 5 else {}
    axes.set_xticks(at, labels, fontsize="small", **turned)
    axes.margins(y=0.12)
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
