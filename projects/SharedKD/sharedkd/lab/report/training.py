"""The sections about training: curves of every loss with the stages' schedules, and gradient shares."""

import re
from collections import defaultdict
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from sharedkd.lab.analysis.pictures import detector_loss
from sharedkd.modeling.stages import Stage

from .markup import Markup, missing, section, tag
from .overview import TASKS, spans
from .source import RunData, Source
from .svg import Band, line_plot, stacked_bar

__all__ = ["curves", "gradients"]

_DISTILL, _WATCH = "distill/", "watch/"
_DETECTOR = "detector"
_LEVELS = "s8: the level of stride 8; s4_s16: a pair of levels."

Curve = List[Tuple[float, float]]
Values = Callable[[Mapping[str, np.ndarray]], np.ndarray]  #: of a run's curves, one per row


def curves(source: Source) -> Markup:
    """The detector's loss of all methods of ``source``, then each one's terms, stage by stage."""
    methods = [m for m in source.record["methods"] if source.runs_of(m)]
    if not methods:
        return section("curves", "Loss curves", tag("p", "No run has a metrics.json yet."))
    own = {m: _mean_curve(source.runs_of(m), detector_loss) for m in methods}
    plots = [tag("figure", tag("figcaption", "The detector's own losses"), _lines("loss", own))]
    for task, title in TASKS.items():
        over = {m: _mean_curve(source.runs_of(m), _metric(f"{task}/AP")) for m in methods}
        if any(len(curve) > 1 for curve in over.values()):
            caption = tag("figcaption", f"{title} over training")
            plots.append(tag("figure", caption, _lines(title, over, y_from_zero=True)))
    first = next((m for m in methods for run in source.runs_of(m) if list(spans(run.config))), None)
    details = [_of_method(m, source.runs_of(m), m == first) for m in methods]
    hint = (
        "Means over the seeds. Shaded is where a stage is on, as high as its weight; its curves are raw "
        f"values, before the weight. {_LEVELS} Names in a legend show and hide their curves."
    )
    return section(
        "curves", "Loss curves", tag("p", hint), tag("div", *plots, class_="plots"), *details
    )


def _of_method(method: str, runs: Sequence[RunData], is_open: bool) -> Markup:
    keys = _sorted(key for run in runs for key in run.curves if key.startswith(_DISTILL))
    stages: Dict[str, List[str]] = defaultdict(list)
    for key in keys:
        stage, _, term = key[len(_DISTILL) :].partition("/")
        if term != "weight":
            stages[stage].append(key)
    losses = sorted({k for run in runs for k in run.curves if k.startswith("loss_")})
    parts = {key.removeprefix("loss_"): _mean_curve(runs, _metric(key)) for key in losses}
    parts["total"] = _mean_curve(runs, _metric("total_loss"))
    end = next((run.max_iter for run in runs if run.max_iter), None)
    figures = [
        tag("figure", tag("figcaption", "All losses, weighted"), _lines("loss", parts, end=end))
    ]
    schedules = {name: stage for run in runs for name, stage in spans(run.config)}
    for stage, names in stages.items():
        terms = {key.split("/", 2)[2]: _mean_curve(runs, _metric(key)) for key in names}
        schedule = schedules.get(stage)
        words = _schedule(schedule, end)
        bands = [_band(schedule, end)] if schedule and end and schedule.span(end)[1] else []
        caption = tag("figcaption", f"Stage {stage}: {words}")
        figures.append(tag("figure", caption, _lines("raw value", terms, bands, end)))
    title = tag("summary", f"{method}: {len(stages)} stage{'s' * (len(stages) != 1)}")
    return tag("details", title, tag("div", *figures, class_="plots"), open=is_open)


def _sorted(keys: Iterable[str]) -> List[str]:
    """Each once, s8 before s16."""
    return sorted(
        set(keys), key=lambda key: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", key)]
    )


def _band(stage: Stage, end: int) -> Band:
    start, stop = stage.span(end)
    full = next((i for i in range(start, stop) if stage.weight_at(i, end) == stage.weight), stop)
    return Band(start, full, stop)


def _schedule(stage: Optional[Stage], end: Optional[int]) -> str:
    if stage is None or end is None:
        return "its schedule is not known, for want of a config.yaml"
    start, stop = stage.span(end)
    if start == stop:
        return "off"
    kind = "of the detector's loss" if stage.relative else "weight"
    return f"{kind} {stage.weight:g}, iterations {start} to {stop} of {end}"


def _lines(
    what: str,
    found: Mapping[str, Curve],
    bands: Sequence[Band] = (),
    end: Optional[int] = None,
    **how: Any,
) -> Markup:
    label = f"{what} over iterations: {', '.join(found)}"
    plot = line_plot(label, found, bands, end, what, **how)
    return plot or tag("p", "No values yet.")


def _metric(key: str) -> Values:
    return lambda found: found.get(key, np.full(len(found["iteration"]), np.nan))


def _mean_curve(runs: Sequence[RunData], values: Values) -> Curve:
    """The mean over runs, at the iterations that all of them have."""
    points: Dict[float, List[float]] = defaultdict(list)
    for run in runs:
        for iteration, value in zip(run.curves["iteration"], values(run.curves)):
            if np.isfinite(value):
                points[float(iteration)].append(float(value))
    most = max(map(len, points.values()), default=0)
    return [(i, sum(x) / len(x)) for i, x in sorted(points.items()) if len(x) == most]


def gradients(source: Source) -> Markup:
    """Each term's share of the student's gradient: a bar per method of ``source``, and curves."""
    parts = []
    for method in source.record["methods"]:
        runs = source.runs_of(method)
        keys = _sorted(k for run in runs for k in run.curves if k.startswith(_WATCH))
        keys.sort(key=lambda key: key != f"{_WATCH}{_DETECTOR}")  # the detector first
        found = {key[len(_WATCH) :]: _mean_curve(runs, _metric(key)) for key in keys}
        shares = {name: sum(y for _, y in c) / len(c) for name, c in found.items() if c}
        if shares:
            count = max(len(curve) for curve in found.values())
            caption = f"{method}: mean of {count} measurement{'s' * (count > 1)}"
            bar = stacked_bar(f"gradient shares of {method}", shares)
            parts.append(tag("figure", tag("figcaption", caption), bar))
            if count > 1:
                caption = tag("figcaption", f"{method}: over training")
                parts.append(tag("figure", caption, _lines("share", found, y_from_zero=True)))
    if not parts:
        parts = [
            missing(
                "No run was long enough for a measurement. For one every so many iterations, train with",
                "train.watch_period=10",
            )
        ]
    hint = (
        "Norm of each term's gradient with respect to the student's parameters, as it counts in the "
        f"total loss, over the sum of these norms. {_LEVELS}"
    )
    return section(
        "gradients", "Gradient shares", tag("p", hint), tag("div", *parts, class_="plots")
    )
