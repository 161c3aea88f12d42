"""The plots of a comparison of methods, each a figure with one panel per task.

A ``record`` is one of :mod:`~sharedkd.lab.scores`.
"""

from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sharedkd.lab.scores import (
    TASKS,
    Record,
    curve_of,
    is_known,
    mean_of,
    rows_of,
    score_of,
    scores_of,
    tasks_of,
)

from .tradeoff import Point, front

__all__ = [
    "PALETTE",
    "draw_curves",
    "plot_ap",
    "plot_cost",
    "plot_curves",
    "plot_sizes",
    "plot_tradeoff",
]

#: Okabe and Ito's colours, which people with any colour vision can tell apart.
PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B")
_BASELINE, _METHOD, _EQUAL_TIME, _TEACHER = PALETTE[:4]
_SIZES = dict(zip(("APs", "APm", "APl"), (PALETTE[5], PALETTE[6], PALETTE[1])))
_MARKERS = "osD^v"  # of methods that share a colour
_ROW = 0.42  # inches, the height of one method in a plot
_COLUMNS = 3  # of a legend


def plot_ap(record: Record) -> Figure:
    """Draw the mean AP of each method with its 95 % interval, and the single seeds below it.

    The baseline's mean and the teacher are vertical lines.  A teacher so far off that the methods
    could not be told apart is left outside the axis, which its legend entry says.
    """
    figure, panels = _method_panels(record)
    for task, axes in panels.items():
        for i, row in enumerate(rows_of(record, task)):
            scores = row.scores["AP"]
            if scores:
                mean, half_width = row.interval()
                style = _style(record, row.method)
                axes.errorbar(mean, i, xerr=half_width, capsize=3, markersize=6, **style)
                below = [i + 0.27] * len(scores)
                axes.plot(scores, below, ".", color=style["color"], markersize=4, alpha=0.6)
        _draw_references(axes, record, task)
        axes.set_xlabel(f"{TASKS[task]} AP (mean, 95 % interval; small dots: single seeds)")
    return figure


def plot_curves(record: Record) -> Figure:
    """Draw the mean AP of each method at the evaluations of its training; the teacher is a line."""
    figure, panels = _task_panels(tasks_of(record), len(record["methods"]))
    for task, axes in panels.items():
        draw_curves(axes, record, task)
    return figure


def draw_curves(axes: Axes, record: Record, task: str) -> None:
    """Draw the panel of one task of :func:`plot_curves`."""
    for i, method in enumerate(record["methods"]):
        points = curve_of(record, method, task)
        if points:
            color, marker = _look(i)
            axes.plot(*zip(*points), marker=marker, color=color, markersize=4, label=method)
    _finish(axes, score_of(record.get("teacher"), task), "iterations", task, "mean over seeds")


def plot_cost(record: Record) -> Figure:
    """Draw AP with its 95 % interval against training time, where both are known."""
    figure, panels = _task_panels(tasks_of(record), len(record["methods"]))
    for task, axes in panels.items():
        for i, row in enumerate(rows_of(record, task)):
            minutes, (mean, half_width) = row.cost("minutes"), row.interval()
            if is_known(minutes) and is_known(mean):
                _mark(axes, i, minutes, mean, half_width, row.method)
        axes.margins(0.12)
        _finish(axes, None, "training minutes", task)
    return figure


def plot_sizes(record: Record) -> Figure:
    """Draw APs, APm and APl of each method as a group of bars with 95 % intervals."""
    figure, panels = _method_panels(record, row_height=1.3 * _ROW)
    for task, axes in panels.items():
        rows = rows_of(record, task)
        for offset, (metric, color) in zip((-0.26, 0, 0.26), _SIZES.items()):
            means, half_widths = zip(*(row.interval(metric) for row in rows))
            axes.barh(
                np.arange(len(rows)) + offset,
                means,
                height=0.24,
                xerr=half_widths,
                color=color,
                label=metric,
                error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "black"},
            )
        # An interval may leave the range that AP has.
        axes.set_xlim(0, min(100, axes.get_xlim()[1]))
        axes.set_xlabel(f"{TASKS[task]} AP by size of the objects (mean, 95 % interval)")
        _legend(axes)
    return figure


def plot_tradeoff(
    points: Mapping[str, Sequence[Point]],
    teacher: Mapping[str, float],
    budget: Optional[float] = None,
) -> Figure:
    """Draw AP with its 95 % interval against latency, with the Pareto front and the budget.

    Args:
        points: task -> students with methods; a mark that is not filled has the latency of a model that
            could not be exported.
        teacher: task -> its AP, perhaps NaN.
        budget: in milliseconds; None: no line.
    """
    methods = list(dict.fromkeys(p.method for found in points.values() for p in found))
    figure, panels = _task_panels(list(points), len(methods) + 3)
    for task, axes in panels.items():
        found = [p for p in points.get(task, ()) if is_known(p.mean) and is_known(p.milliseconds)]
        for i, method in enumerate(methods):
            for exported, label in ((True, method), (False, f"{method} (eager)")):
                some = [p for p in found if p.method == method and p.exported == exported]
                if some:
                    x, y = [p.milliseconds for p in some], [p.mean for p in some]
                    _mark(axes, i, x, y, [p.half_width for p in some], label, filled=exported)
        for student in dict.fromkeys(p.student for p in found):
            top = max((p for p in found if p.student == student), key=lambda p: p.mean)
            at = (top.milliseconds, top.mean)
            axes.annotate(student, at, (6, 6), textcoords="offset points", fontsize=8)
        best = front(found)
        if best:
            x, y = [p.milliseconds for p in best], [p.mean for p in best]
            (ring,) = axes.plot(x, y, "o-", color=PALETTE[-1], linewidth=1, label="Pareto front")
            ring.set(fillstyle="none", markersize=14, zorder=0)
        if budget is not None:
            axes.axvline(budget, color=PALETTE[5], linestyle=":", label=f"budget: {budget:g} ms")
        axes.margins(0.15)
        _finish(axes, teacher.get(task), "milliseconds per image (median)", task)
    return figure


def _mark(
    axes: Axes, i: int, x: Any, y: Any, half_width: Any, label: str, filled: bool = True
) -> None:
    """Draw points of the method number ``i`` with their intervals."""
    color, marker = _look(i)
    inside = color if filled else "none"
    style: Dict[str, Any] = {"fmt": marker, "color": color, "markerfacecolor": inside}
    axes.errorbar(x, y, yerr=half_width, capsize=3, markersize=7, label=label, **style)


def _finish(
    axes: Axes,
    teacher: Optional[float],
    x_label: str,
    task: str,
    of: str = "mean, 95 % interval",
) -> None:
    if is_known(teacher):
        axes.axhline(teacher, color=_TEACHER, linestyle="--", label="teacher")
    axes.set(xlabel=x_label, ylabel=f"{TASKS[task]} AP ({of})")
    axes.grid(alpha=0.3)
    _legend(axes)


def _method_panels(record: Record, row_height: float = _ROW) -> Tuple[Figure, Dict[str, Axes]]:
    """A panel per task with one row per method."""
    methods, tasks = record["methods"], tasks_of(record) or ["bbox"]
    size = (1.5 + 5.5 * len(tasks), 1.6 + row_height * len(methods))
    figure, panels = _panels(tasks, size, sharey=True)
    for axes in panels.values():
        axes.set_axisbelow(True)
        axes.grid(axis="x", alpha=0.3)
    has_result = [any(scores_of(record, method, task) for task in tasks) for method in methods]
    names = [name if known else f"{name} (no result)" for name, known in zip(methods, has_result)]
    first = next(iter(panels.values()))
    first.set_yticks(range(len(methods)), names)
    first.set_ylim(len(methods) - 0.4, -0.6)  # the first one on top
    return figure, panels


def _style(record: Record, method: str) -> Dict[str, Any]:
    """The style of a point: baseline, method, or student trained for another method's time."""
    if method == record["baseline"]:
        return {"color": _BASELINE, "fmt": "s"}
    return {"color": _EQUAL_TIME, "fmt": "D"} if "@" in method else {"color": _METHOD, "fmt": "o"}


def _draw_references(axes: Axes, record: Record, task: str) -> None:
    low, high = axes.get_xlim()
    baseline = mean_of(scores_of(record, record["baseline"], task).values())
    if is_known(baseline):
        label = f"baseline ({record['baseline']}): {baseline:.2f}"
        axes.axvline(baseline, color=_BASELINE, linewidth=1, zorder=0, label=label)
    teacher = score_of(record.get("teacher"), task)
    if is_known(teacher):
        near = low - (high - low) / 2 <= teacher <= high + (high - low) / 2
        label = f"teacher: {teacher:.2f}" + ("" if near else ", outside the axis")
        axes.axvline(teacher, color=_TEACHER, linestyle="--", zorder=0, label=label)
        if not near:
            axes.set_xlim(low, high)
    _legend(axes)


def _task_panels(tasks: Sequence[str], entries: int) -> Tuple[Figure, Dict[str, Axes]]:
    """A panel per task, with room for a legend of so many entries below."""
    tasks, rows = tasks or ["bbox"], -(-entries // _COLUMNS)
    return _panels(tasks, (6.5 * len(tasks), 4.6 + 0.25 * rows))


def _panels(
    tasks: Sequence[str], size: Tuple[float, float], **how: Any
) -> Tuple[Figure, Dict[str, Axes]]:
    """A panel per task, side by side."""
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    return figure, dict(zip(tasks, figure.subplots(1, len(tasks), squeeze=False, **how)[0]))


def _look(i: int) -> Tuple[str, str]:
    """Colour and marker of the method number ``i``."""
    return PALETTE[i % len(PALETTE)], _MARKERS[i // len(PALETTE) % len(_MARKERS)]


def _legend(axes: Axes) -> None:
    """Add a legend below the panel."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.65 / axes.get_figure(root=True).get_figheight()),
            ncols=_COLUMNS,
        )
