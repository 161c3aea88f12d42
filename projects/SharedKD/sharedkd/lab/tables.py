"""The table that compares trained detectors: accuracy, size and speed, one row per model."""

from typing import Any, Mapping, Optional, Sequence

from tabulate import tabulate

from .scores import MORE_METRICS, TASKS, is_known

__all__ = ["results_table"]

_METRICS = ("AP", *MORE_METRICS)


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format results as a Markdown table.

    Args:
        rows: one mapping per model, with "name" and any of

            * "bbox" and "segm": metric name to percentage, as Detectron2's COCO evaluator returns
              them, of which AP, AP50, AP75, APs, APm and APl are shown;
            * "parameters": the number of parameters;
            * "seconds_per_image": inference time.

    Returns:
        The table, in the order of ``rows``.  Missing values and NaN are shown as "-".
        The columns of a task that no row has are left out.

    Raises:
        KeyError: a row has no "name".
    """
    tasks = [task for task in TASKS if any(row.get(task) for row in rows)]
    headers = ["model"]
    headers += [f"{TASKS[task]} {metric}" for task in tasks for metric in _METRICS]
    headers += ["parameters", "s / image"]
    body = []
    for row in rows:
        cells = [row["name"]]
        for task in tasks:
            results = row.get(task) or {}
            cells += [_number(results.get(metric), ".2f") for metric in _METRICS]
        cells += [
            _number(row.get("parameters"), ",d"),
            _number(row.get("seconds_per_image"), ".4f"),
        ]
        body.append(cells)
    # The cells are formatted already: tabulate must not parse them back into numbers.
    return tabulate(
        body,
        headers,
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["left"] + ["right"] * (len(headers) - 1),
    )


def _number(value: Optional[float], layout: str) -> str:
    return format(value, layout) if is_known(value) else "-"
