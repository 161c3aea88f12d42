"""Tables in Markdown, and the numbers in their cells."""

from typing import Any, Mapping, Optional, Sequence

from tabulate import tabulate

from .scores import MORE_METRICS, TASKS, Difference, is_known

__all__ = ["bounded", "markdown", "number", "results_table", "with_bounds", "with_half_width"]


def markdown(
    rows: Sequence[Sequence[Any]], headers: Sequence[str], left: Optional[Sequence[str]] = None
) -> str:
    """A table of formatted cells; flush left are the columns ``left``, or all."""
    columns = ["left" if left is None or x in left else "right" for x in headers]
    # The cells are formatted already: tabulate must not parse them back into numbers.
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=columns)


def number(value: Optional[float], layout: str = ".2f", unknown: str = "-") -> str:
    """``value`` in that layout; ``unknown`` for None, NaN and infinity."""
    return format(value, layout) if is_known(value) else unknown


def with_half_width(mean: float, half_width: float, unknown: str = "-") -> str:
    """A mean with the half width of its interval, if it has one."""
    return number(mean, unknown=unknown) + (f" ± {half_width:.2f}" if is_known(half_width) else "")


def with_bounds(gain: Difference, unknown: str = "-", layout: str = "+.2f") -> str:
    """A mean difference with the bounds of its interval, if it has one."""
    return bounded(gain.mean, gain.low, gain.high, layout, unknown)


def bounded(mean: float, low: float, high: float, layout: str, unknown: str = "-") -> str:
    """A mean with the bounds of its interval, if they are known."""
    bounds = f" [{low:{layout}}, {high:{layout}}]" if is_known(low) else ""
    return number(mean, layout, unknown) + bounds


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format results of trained detectors: accuracy, size and speed, a row per model.

    Args:
        rows: one mapping per model, with "name" and any of "bbox" and "segm" (metric -> percentage,
            of Detectron2's COCO evaluator), "parameters" and "seconds_per_image".

    Missing values and NaN are shown as "-"; columns of a task that no row has are left out.
    """
    tasks = [task for task in TASKS if any(row.get(task) for row in rows)]
    columns = [(task, metric) for task in tasks for metric in ("AP", *MORE_METRICS)]
    body = [
        [
            row["name"],
            *(number((row.get(task) or {}).get(metric)) for task, metric in columns),
            number(row.get("parameters"), ",d"),
            number(row.get("seconds_per_image"), ".4f"),
        ]
        for row in rows
    ]
    headers = ["model", *(f"{TASKS[task]} {metric}" for task, metric in columns)]
    return markdown(body, [*headers, "parameters", "s / image"], left=["model"])
