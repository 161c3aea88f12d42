"""The plots of a comparison of methods: AP, AP against training time, AP by size of the objects.

The records are those of :mod:`~sharedkd.lab.scores`.
"""

from typing import IO, Any, Dict, Mapping, Tuple, Union

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sharedkd.lab.scores import (
    TASKS,
    interval,
    is_known,
    mean_of,
    minutes_of,
    score_of,
    scores_of,
    tasks_of,
)

__all__ = ["plot_ap", "plot_cost", "plot_sizes"]

# Of Okabe and Ito's palette, which people with any colour vision can tell apart.
_BASELINE, _METHOD, _EQUAL_TIME, _TEACHER = "#000000", "#0072B2", "#D55E00", "#009E73"
_SIZES = {"APs": "#E69F00", "APm": "#56B4E9", "APl": "#0072B2"}
_ROW = 0.42  # inches, the height of one method in a plot
_DPI = 120


def plot_ap(record: Mapping[str, Any], path: Union[str, IO[bytes]]) -> Figure:
    """Draw the mean AP of each method with its 95 % interval, and the single seeds below it.

    The baseline's mean and the teacher are vertical lines.  A teacher so far off that the methods
    could not be told apart is left outside the axis, which its legend entry says.

    Args:
        record: as :mod:`~sharedkd.lab.scores` describes it.
        path: the PNG file to write, its name or open in binary.

    Returns:
        The figure that was written, one panel per task.
    """
    figure, panels = _method_panels(record)
    for task, axes in panels.items():
        for row, method in enumerate(record["methods"]):
            scores = list(scores_of(record, method, task).values())
            if scores:
                mean, half_width = interval(scores)
                style = _style(record, method)
                axes.errorbar(mean, row, xerr=half_width, capsize=3, markersize=6, **style)
                below = [row + 0.27] * len(scores)
                axes.plot(scores, below, ".", color=style["color"], markersize=4, alpha=0.6)
        _draw_references(axes, record, task)
        axes.set_xlabel(f"{TASKS[task]} AP (mean, 95 % interval; small dots: single seeds)")
    return _save(figure, path)


def plot_cost(record: Mapping[str, Any], path: Union[str, IO[bytes]]) -> Figure:
    """Draw AP with its 95 % interval against training time, one named point per method.

    Args:
        record: as :mod:`~sharedkd.lab.scores` describes it.
        path: the PNG file to write, its name or open in binary.

    Returns:
        The figure that was written, one panel per task.  Methods without AP or time are left out.
    """
    tasks = tasks_of(record) or ["bbox"]
    figure = Figure(figsize=(7.5 * len(tasks), 6), dpi=_DPI, layout="constrained")
    panels = dict(zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0]))
    marks: Dict[str, Dict[str, Tuple[float, float, float]]] = {}
    for task, axes in panels.items():
        marks[task] = _cost_marks(record, task)
        for method, (minutes, mean, half_width) in marks[task].items():
            style = _style(record, method)
            axes.errorbar(
                minutes, mean, yerr=half_width, capsize=3, markersize=7, elinewidth=1.2, **style
            )
        axes.margins(0.12)
        axes.set_xlabel("training minutes")
        axes.set_ylabel(f"{TASKS[task]} AP (mean, 95 % interval)")
        axes.grid(alpha=0.3)
    # The names are placed in pixels, and these are known once the layout is.
    figure.draw_without_rendering()
    for task, axes in panels.items():
        _place_names(
            axes, marks[task], {name: _style(record, name)["color"] for name in marks[task]}
        )
    return _save(figure, path)


def plot_sizes(record: Mapping[str, Any], path: Union[str, IO[bytes]]) -> Figure:
    """Draw APs, APm and APl of each method as a group of bars with 95 % intervals.

    Args:
        record: as :mod:`~sharedkd.lab.scores` describes it.
        path: the PNG file to write, its name or open in binary.

    Returns:
        The figure that was written, one panel per task, which holds one container of bars per size.
    """
    figure, panels = _method_panels(record, row_height=1.3 * _ROW)
    rows = np.arange(len(record["methods"]))
    for task, axes in panels.items():
        for offset, (metric, color) in zip((-0.26, 0, 0.26), _SIZES.items()):
            scores = [scores_of(record, method, task, metric) for method in record["methods"]]
            means, half_widths = zip(*(interval(list(values.values())) for values in scores))
            axes.barh(
                rows + offset,
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
    return _save(figure, path)


def _method_panels(
    record: Mapping[str, Any], row_height: float = _ROW
) -> Tuple[Figure, Dict[str, Axes]]:
    """One panel per task, side by side, with one row per method."""
    tasks = tasks_of(record) or ["bbox"]
    methods = record["methods"]
    size = (1.5 + 5.5 * len(tasks), 1.6 + row_height * len(methods))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    panels = dict(zip(tasks, figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]))
    for axes in panels.values():
        axes.set_axisbelow(True)
        axes.grid(axis="x", alpha=0.3)
    first = panels[tasks[0]]
    has_result = [any(scores_of(record, method, task) for task in tasks) for method in methods]
    names = [name if known else f"{name} (no result)" for name, known in zip(methods, has_result)]
    first.set_yticks(range(len(methods)), names)
    first.set_ylim(len(methods) - 0.4, -0.6)  # the first one on top
    return figure, panels


def _style(record: Mapping[str, Any], method: str) -> Dict[str, Any]:
    """The baseline, methods, and students trained for another method's time look different."""
    if method == record["baseline"]:
        return {"color": _BASELINE, "fmt": "s"}
    return {"color": _EQUAL_TIME, "fmt": "D"} if "@" in method else {"color": _METHOD, "fmt": "o"}


def _draw_references(axes: Axes, record: Mapping[str, Any], task: str) -> None:
    low, high = axes.get_xlim()
    baseline = mean_of(list(scores_of(record, record["baseline"], task).values()))
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


def _legend(axes: Axes) -> None:
    """Below the panel, where it covers nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.65 / axes.get_figure(root=True).get_figheight()),
            ncols=3,
        )


def _cost_marks(record: Mapping[str, Any], task: str) -> Dict[str, Tuple[float, float, float]]:
    """Method to training minutes, mean AP and the half width of its interval."""
    marks = {}
    for method in record["methods"]:
        minutes = minutes_of(record, method)
        mean, half_width = interval(list(scores_of(record, method, task).values()))
        if is_known(minutes) and is_known(mean):
            marks[method] = (minutes, mean, half_width)
    return marks


def _place_names(
    axes: Axes, marks: Mapping[str, Tuple[float, float, float]], colors: Mapping[str, str]
) -> None:
    """Write each name near its mark, where it covers least of the marks, bars and other names."""
    taken = []  # rectangles in pixels: left, bottom, right, top
    for x, mean, half_width in marks.values():
        reach = half_width if is_known(half_width) else 0
        low, centre, high = axes.transData.transform([(x, mean + d) for d in (-reach, 0, reach)])
        taken += [np.hstack([low - 4, high + 4]), np.hstack([centre - 14, centre + 14])]
    for method, (x, mean, _) in marks.items():
        label = axes.annotate(
            method,
            (x, mean),
            (0, 0),
            textcoords="offset pixels",
            ha="center",
            va="center",
            fontsize=9,
            color=colors[method],
            arrowprops={"arrowstyle": "-", "color": colors[method], "linewidth": 0.6, "shrinkB": 4},
        )
        label.set_in_layout(False)  # the layout that the pixels are of must stay
        half = np.array(label.get_window_extent().size) / 2
        offsets = _offsets(half)
        centres = axes.transData.transform((x, mean)) + offsets
        spots = np.hstack([centres - half - 2, centres + half + 2])
        inside = _overlap(spots, np.array(axes.bbox.extents))
        covered = (
            sum(_overlap(spots, other) for other in taken) - inside
        )  # as bad as a mark: outside
        best = np.argmin(covered.round())  # of equals the first, which is the nearest
        label.set_position(offsets[best])
        taken.append(spots[best])


def _offsets(half: np.ndarray) -> np.ndarray:
    """Where the centre of a label may be: pixels from its mark, (spots, 2), on ellipses, near first.

    Args:
        half: half the width and height of the label in pixels.
    """
    gaps, angles = np.meshgrid(
        np.arange(18, 130, 6), np.linspace(0, 2 * np.pi, 24, endpoint=False), indexing="ij"
    )
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return (directions * (gaps[..., None] + half)).reshape(-1, 2)


def _overlap(spots: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The area that each of the rectangles (spots, 4) shares with the rectangle (4,)."""
    sides = np.minimum(spots[:, 2:], other[2:]) - np.maximum(spots[:, :2], other[:2])
    return sides.clip(0).prod(axis=1)


def _save(figure: Figure, path: Union[str, IO[bytes]]) -> Figure:
    figure.savefig(path, format="png")  # whatever the path ends in
    return figure
