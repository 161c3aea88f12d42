"""Tables in Markdown, and the numbers in their cells."""

from typing import Any, Mapping, Optional, Sequence

from tabulate import tabulate

from .scores import MORE_METRICS, TASKS, is_known

__all__ = ["between", "markdown", "number", "results_table"]


def markdown(rows: Sequence[Sequence[Any]], headers: Sequence[str], align: str = "left") -> str:
    """A table of ``rows`` whose cells are formatted; ``align``: all columns but the first."""
    columns = ["left"] + [align] * (len(headers) - 1)
    # The cells are formatted already: tabulate must not parse them back into numbers.
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=columns)


def number(value: Optional[float], layout: str = ".2f", unknown: str = "-") -> str:
    """``value`` in that layout; ``unknown`` for None, NaN and infinity."""
    return format(value, layout) if is_known(value) else unknown


def between(difference: Mapping[str, Any]) -> str:
    """What :func:`~.scores.paired` found, in words: the mean, and its interval if it has one."""
    mean = number(difference["mean"], "+.3f")
    known = is_known(difference["low"])
    return f"{mean} [{difference['low']:+.3f}, {difference['high']:+.3f}]" if known else mean


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format results of trained detectors: accuracy, size and speed, a row per model.

    Args:
        rows: one mapping per model, with "name" and any of

            * "bbox" and "segm": metric name to percentage, as Detectron2's COCO evaluator returns
              them, of which AP, AP50, AP75, APs, APm and APl are shown;
            * "parameters": the number of parameters;
            * "seconds_per_image": inference time.

    Returns:
        The table, in the order of ``rows``.  Missing values and NaN are shown as "-".
        The columns of a task that no row has are left out.
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
    return markdown(body, [*headers, "parameters", "s / image"], align="right")
