"""Plots of training: curves of AP, losses and step time, and shares of the gradient."""

import re
from collections import defaultdict
from functools import partial
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from matplotlib.figure import Figure

from sharedkd.lab.compare.plots import plot_ap, plot_cost, plot_sizes
from sharedkd.lab.metrics import detector_loss
from sharedkd.lab.scores import TASKS, measured, tasks_of
from sharedkd.modeling.stages import Stage

from .figures import Curve, Plot, as_svg, draw_curves
from .source import RunData, Source

__all__ = ["bars", "curves", "gradients", "mean_curve", "step_time", "terms"]

_DISTILL, _WATCH = "distill/", "watch/"

Values = Callable[[Mapping[str, np.ndarray]], np.ndarray]  #: of a run's curves, one per row


def curves(source: Source) -> List[Plot]:
    """AP over training and the detector's own losses: a curve per method."""
    plots = [
        _of_methods(source, f"{title} AP", _metric(f"{task}/AP"), from_zero=True, least=2)
        for task, title in reversed(TASKS.items())
    ]
    return [p for p in (*plots, _of_methods(source, "detector's own losses", detector_loss)) if p]


def step_time(source: Source) -> List[Plot]:
    """Seconds per step over training, and of several methods AP against training time."""
    steps = _of_methods(source, "seconds per step", _metric("time"), from_zero=True)
    drawn = [] if source.is_single else _of_record(source, {"AP against training time": plot_cost})
    return [*([steps] if steps else []), *drawn]


def bars(source: Source) -> List[Plot]:
    """AP of the methods with intervals and single seeds, and AP by size of the objects."""
    if source.kind != "comparison":
        return []
    sized = any(x.scores["APs"] for rows in measured(source.record).values() for x in rows)
    return _of_record(source, {"AP": plot_ap, **({"AP by size": plot_sizes} if sized else {})})


def _of_record(source: Source, draws: Mapping[str, Callable[..., Figure]]) -> List[Plot]:
    """Plots of the results, by their captions; none without results."""
    return [
        Plot(caption, as_svg(partial(draw, source.record), f"{caption} of the methods"))
        for caption, draw in draws.items()
        if tasks_of(source.record)
    ]


def terms(source: Source) -> Dict[str, List[Plot]]:
    """Method -> all losses, then the raw values of each stage's terms with its schedule."""
    return {
        method: _of_method(method, source.runs_of(method))
        for method in source.record["methods"]
        if source.runs_of(method)
    }


def gradients(source: Source) -> Dict[str, Tuple[Dict[str, float], int, Optional[Plot]]]:
    """Method -> mean share of the gradient by term, the number of measurements, and curves."""
    found = {}
    for method in source.record["methods"]:
        runs = source.runs_of(method)
        keys = _sorted(k for run in runs for k in run.curves if k.startswith(_WATCH))
        keys.sort(key=lambda key: key != f"{_WATCH}detector")  # the detector first
        each = {key[len(_WATCH) :]: mean_curve(runs, _metric(key)) for key in keys}
        shares = {name: float(np.mean(y)) for name, (_, y) in each.items() if len(y)}
        if shares:
            count = max(len(x) for x, _ in each.values())
            plot = _plot(method, "over training", each, "share", from_zero=True)
            found[method] = (shares, count, plot if count > 1 else None)
    return found


def mean_curve(runs: Sequence[RunData], values: Values) -> Curve:
    """The mean over ``runs`` at common iterations: with others it would jump where a run ends."""
    points: Dict[float, List[float]] = defaultdict(list)
    for run in runs:
        for iteration, value in zip(run.curves["iteration"], values(run.curves)):
            if np.isfinite(value):
                points[float(iteration)].append(float(value))
    most = max(map(len, points.values()), default=0)
    x = [i for i in sorted(points) if len(points[i]) == most]
    return x, [sum(points[i]) / most for i in x]


def _of_methods(
    source: Source, what: str, values: Values, least: int = 1, **how: Any
) -> Optional[Plot]:
    """One curve per method; None if no method has ``least`` points."""
    found = {m: mean_curve(source.runs_of(m), values) for m in source.record["methods"]}
    if max((len(x) for x, _ in found.values()), default=0) < least:
        return None
    return _plot("methods", f"{what[0].upper()}{what[1:]} over training", found, what, **how)


def _of_method(method: str, runs: Sequence[RunData]) -> List[Plot]:
    keys = _sorted(key for run in runs for key in run.curves if key.startswith(_DISTILL))
    stages: Dict[str, List[str]] = defaultdict(list)
    for key in keys:
        _, stage, term = key.split("/", 2)
        if term != "weight":
            stages[stage].append(key)
    losses = sorted({k for run in runs for k in run.curves if k.startswith("loss_")})
    parts = {key.removeprefix("loss_"): mean_curve(runs, _metric(key)) for key in losses}
    parts["total"] = mean_curve(runs, _metric("total_loss"))
    end = next((run.max_iter for run in runs if run.max_iter), None)
    schedules = {name: stage for run in runs for name, stage in run.stages.items()}
    plots = [_plot(method, "All losses, weighted", parts, "loss", end=end)]
    for stage, names in stages.items():
        raw = {key.split("/", 2)[2]: mean_curve(runs, _metric(key)) for key in names}
        text, band = schedule(schedules.get(stage), end)
        plots.append(_plot(method, f"Stage {stage}: {text}", raw, "raw value", band=band, end=end))
        factor = re.compile(rf"factor/{re.escape(stage)}(/|$)")
        names = _sorted(key for run in runs for key in run.curves if factor.match(key))
        factors = {key.partition("/")[2]: mean_curve(runs, _metric(key)) for key in names}
        plots.append(
            _plot(method, f"Stage {stage}: its automatic factor", factors, "factor", end=end)
        )
    return [plot for plot in plots if plot]


def schedule(
    stage: Optional[Stage], end: Optional[int]
) -> Tuple[str, Optional[Tuple[float, float, float]]]:
    """A stage's schedule as text, and as the band of :func:`~.figures.draw_curves`."""
    if stage is None or end is None:
        return "its schedule is not known without a config.yaml", None
    start, stop = stage.span(end)
    if start == stop:
        return "off", None
    full = next((i for i in range(start, stop) if stage.weight_at(i, end) == stage.full), stop)
    return f"{stage}, iterations {start} to {stop} of {end}", (start, full, stop)


def _plot(
    where: str, caption: str, found: Mapping[str, Curve], y_label: str, **how: Any
) -> Optional[Plot]:
    """None if there is no value in the curves."""
    if not any(len(x) for x, _ in found.values()):
        return None
    label = f"{where}, {caption}: {', '.join(found)}"
    return Plot(caption, as_svg(lambda: draw_curves(found, y_label, **how), label), list(found))


def _metric(key: str) -> Values:
    return lambda found: found.get(key, np.full(len(found["iteration"]), np.nan))


def _sorted(keys: Iterable[str]) -> List[str]:
    """Each once, s8 before s16."""
    return sorted(
        set(keys), key=lambda key: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", key)]
    )
