"""A comparison of distillation methods: statistics over seeds, a Markdown report and plots.

All functions read one record, a plain dict as ``results.json`` holds it:

* "methods": names in the order of the report; "a@b" is method a trained for the time of method b;
* "baseline": the method that the others are compared with;
* "arms": one mapping per training run, with "method", "seed" and "status" ("finished", "failed" or
  "missing").  A finished one has "results" (task "bbox" or "segm" to metric name to percentage) and
  may have "iterations", "seconds_per_step", "peak_memory_mb", "parameters" (of which "losses" is
  read), "initial_weights" (a digest), "hardware", "versions" and "collapsed" (tasks in which it finds
  nothing, so that its AP is zero); the others may have "error";
* optionally "teacher", its results; "config_file", "overrides", "command", and "configs": method to
  its whole config.

A value that is NaN or None counts as one that is not there.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t
from tabulate import tabulate

from ..checkpoints.files import replace
from .strict_json import strict_json

__all__ = [
    "Difference",
    "Row",
    "difference",
    "interval",
    "measured",
    "notes",
    "plot_ap",
    "plot_cost",
    "plot_sizes",
    "report",
    "write",
]

_CONFIDENCE = 0.95
_TASKS = {"bbox": "box", "segm": "mask"}
_MORE_METRICS = ("AP50", "AP75", "APs", "APm", "APl")
# Of Okabe and Ito's palette, which people with any colour vision can tell apart.
_BASELINE, _METHOD, _EQUAL_TIME, _TEACHER = "#000000", "#0072B2", "#D55E00", "#009E73"
_SIZES = {"APs": "#E69F00", "APm": "#56B4E9", "APl": "#0072B2"}
_ROW = 0.42  # inches, the height of one method in a plot
_DPI = 120


def interval(values: Sequence[float], confidence: float = _CONFIDENCE) -> Tuple[float, float]:
    """Student's t interval of the mean of independent values.

    Returns:
        The mean and the half width of the interval, in the unit of ``values``.  Of one value the
        half width is NaN, of none both are.

    >>> "%.3f +- %.3f" % interval([1.0, 2.0, 3.0])
    '2.000 +- 2.484'
    """
    if len(values) == 0:
        return math.nan, math.nan
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, math.nan
    quantile = t.ppf((1 + confidence) / 2, df=len(values) - 1)
    return mean, float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Difference:
    """A mean difference between two methods, with its 95 % interval.

    Args:
        mean: in points of the metric; positive where the method has more than the reference.
        half_width: of the interval; NaN with fewer than two seeds.
        seeds: how many seeds both methods have.
    """

    mean: float
    half_width: float
    seeds: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def verdict(self) -> str:
        """In words; "better" and "worse" only where the interval excludes zero."""
        if self.seeds == 0:
            return "no common seed"
        if self.seeds == 1:
            return "one seed: no interval"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference shown"


def difference(
    record: Mapping[str, Any], method: str, reference: str, task: str, metric: str = "AP"
) -> Difference:
    """What ``method`` has more than ``reference``, paired over the seeds that both have.

    Args:
        task: "bbox" or "segm".
        metric: a name in the arms' results.
    """
    ours, theirs = (_scores(record, name, task, metric) for name in (method, reference))
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return Difference(*interval(pairs), seeds=len(pairs))


@dataclass(frozen=True)
class Row:
    """What was measured of one method on one task; NaN where nothing was.

    Args:
        method: its name.
        scores: seed to AP.
        mean, half_width: of AP over seeds, see :func:`interval`.
        metrics: AP50, AP75, APs, APm and APl to their means.
        gain: against the baseline; None for the baseline itself.
        iterations, seconds_per_step, minutes, peak_memory_mb, loss_parameters: means over seeds.
    """

    method: str
    scores: Mapping[int, float]
    mean: float
    half_width: float
    metrics: Mapping[str, float]
    gain: Optional[Difference]
    iterations: float
    seconds_per_step: float
    minutes: float
    peak_memory_mb: float
    loss_parameters: float


def measured(record: Mapping[str, Any]) -> Dict[str, List[Row]]:
    """Of each task that was evaluated ("bbox", "segm"), a row per method."""
    return {task: [_row(record, m, task) for m in record["methods"]] for task in _tasks(record)}


def _row(record: Mapping[str, Any], method: str, task: str) -> Row:
    scores, baseline = _scores(record, method, task), record["baseline"]
    mean, half_width = interval(list(scores.values()))
    return Row(
        method,
        scores,
        mean,
        half_width,
        {m: _mean(list(_scores(record, method, task, m).values())) for m in _MORE_METRICS},
        None if method == baseline else difference(record, method, baseline, task),
        _mean(_costs(record, method, "iterations")),
        _mean(_costs(record, method, "seconds_per_step")),
        _minutes(record, method),
        _mean(_costs(record, method, "peak_memory_mb")),
        _mean(_loss_parameters(record, method)),
    )


def notes(record: Mapping[str, Any]) -> List[str]:
    """What a reader of the numbers must know, as Markdown paragraphs and lists."""
    found = [*_warnings(record), *_equal_time_notes(record)]
    gaps = _gaps(record)
    return [*found, *(["\n".join(gaps)] if gaps else []), _caveats(record)]


def report(record: Mapping[str, Any]) -> str:
    """The comparison in Markdown: warnings, a table per task, costs, gaps, and how to read it."""
    parts = ["# Comparison of distillation methods", *_warnings(record)]
    for task in _tasks(record):
        parts += [f"## {_TASKS[task].capitalize()} AP", _ap_table(record, task)]
    parts += ["## Cost", _cost_table(record), *_equal_time_notes(record)]
    gaps = _gaps(record)
    if gaps:
        parts += ["## Arms to know of", "\n".join(gaps)]
    parts += ["## How to read this", _caveats(record), "\n".join(_origin(record))]
    return "\n\n".join(parts) + "\n"


def plot_ap(record: Mapping[str, Any], path: Union[str, IO[bytes]]) -> Figure:
    """Draw the mean AP of each method with its 95 % interval, and the single seeds below it.

    The baseline's mean and the teacher are vertical lines.  A teacher so far off that the methods
    could not be told apart is left outside the axis, which its legend entry says.

    Args:
        path: the PNG file to write.

    Returns:
        The figure that was written, one panel per task.
    """
    figure, panels = _method_panels(record)
    for task, axes in panels.items():
        for row, method in enumerate(record["methods"]):
            scores = list(_scores(record, method, task).values())
            if scores:
                mean, half_width = interval(scores)
                style = _style(record, method)
                axes.errorbar(mean, row, xerr=half_width, capsize=3, markersize=6, **style)
                below = [row + 0.27] * len(scores)
                axes.plot(scores, below, ".", color=style["color"], markersize=4, alpha=0.6)
        _draw_references(axes, record, task)
        axes.set_xlabel(f"{_TASKS[task]} AP (mean, 95 % interval; small dots: single seeds)")
    return _save(figure, path)


def plot_cost(record: Mapping[str, Any], path: Union[str, IO[bytes]]) -> Figure:
    """Draw AP with its 95 % interval against training time, one named point per method.

    Args:
        path: the PNG file to write.

    Returns:
        The figure that was written, one panel per task.  Methods without AP or time are left out.
    """
    tasks = _tasks(record) or ["bbox"]
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
        axes.set_ylabel(f"{_TASKS[task]} AP (mean, 95 % interval)")
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
        path: the PNG file to write.

    Returns:
        The figure that was written, one panel per task, which holds one container of bars per size.
    """
    figure, panels = _method_panels(record, row_height=1.3 * _ROW)
    rows = np.arange(len(record["methods"]))
    for task, axes in panels.items():
        for offset, (metric, color) in zip((-0.26, 0, 0.26), _SIZES.items()):
            scores = [_scores(record, method, task, metric) for method in record["methods"]]
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
        axes.set_xlabel(f"{_TASKS[task]} AP by size of the objects (mean, 95 % interval)")
        _legend(axes)
    return _save(figure, path)


def write(record: Mapping[str, Any], folder: str, writer: str = "") -> None:
    """Write ``results.json``, ``report.md`` and the plots ``ap.png``, ``cost.png``, ``sizes.png``.

    Each file appears complete or not at all.  The JSON is strict: values that are not finite become
    null.

    Args:
        folder: created if it does not exist.
        writer: see :func:`~sharedkd.checkpoints.files.replace`.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)

    def put(name: str, fill: Callable[[IO[bytes]], Any]) -> None:
        replace(str(target / name), fill, writer)

    # The measurements first: all else can be made from them again.
    put("results.json", lambda f: f.write(strict_json(record)))
    plots = {"ap": plot_ap, "cost": plot_cost, "sizes": plot_sizes}
    titles = {"ap": "AP", "cost": "AP against training time", "sizes": "AP by size of the objects"}
    for name, plot in plots.items():
        put(f"{name}.png", lambda f: plot(record, f))
    links = "\n\n".join(f"![{title}]({name}.png)" for name, title in titles.items())
    hint = (
        "The plots show intervals of the means. What all methods of a seed share widens these, but "
        "not those of the paired differences in the tables, which the verdicts rest on."
    )
    text = f"{report(record)}\n## Plots\n\n{hint}\n\n{links}\n"
    put("report.md", lambda f: f.write(text.encode()))


# Reading the record


def _is_known(value: Optional[float]) -> bool:
    return value is not None and math.isfinite(value)


def _finished(record: Mapping[str, Any]) -> List[Mapping[str, Any]]:
    return [arm for arm in record["arms"] if arm["status"] == "finished"]


def _finished_of(record: Mapping[str, Any], method: str) -> List[Mapping[str, Any]]:
    return [arm for arm in _finished(record) if arm["method"] == method]


def _score(results: Optional[Mapping[str, Any]], task: str, metric: str = "AP") -> float:
    """NaN where the results lack it."""
    value = ((results or {}).get(task) or {}).get(metric)
    return value if _is_known(value) else math.nan


def _scores(
    record: Mapping[str, Any], method: str, task: str, metric: str = "AP"
) -> Dict[int, float]:
    """Seed to score, of the seeds that have one."""
    arms = _finished_of(record, method)
    scores = {arm["seed"]: _score(arm.get("results"), task, metric) for arm in arms}
    return {seed: score for seed, score in scores.items() if _is_known(score)}


def _tasks(record: Mapping[str, Any]) -> List[str]:
    """The tasks that a finished arm was evaluated on."""
    results = [arm.get("results") or {} for arm in _finished(record)]
    return [task for task in _TASKS if any(result.get(task) for result in results)]


def _costs(record: Mapping[str, Any], method: str, name: str) -> List[float]:
    """The known values of "iterations", "seconds_per_step" and the like, one per finished arm."""
    values = (arm.get(name) for arm in _finished_of(record, method))
    return [value for value in values if _is_known(value)]


def _loss_parameters(record: Mapping[str, Any], method: str) -> List[int]:
    values = ((arm.get("parameters") or {}).get("losses") for arm in _finished_of(record, method))
    return [value for value in values if _is_known(value)]


def _minutes(record: Mapping[str, Any], method: str) -> float:
    """Training time, the mean over the finished arms."""
    arms = _finished_of(record, method)
    pairs = [(arm.get("iterations"), arm.get("seconds_per_step")) for arm in arms]
    return _mean(
        [steps * time / 60 for steps, time in pairs if _is_known(steps) and _is_known(time)]
    )


def _mean(values: Sequence[float]) -> float:
    return interval(values)[0]


# The report


def _ap_table(record: Mapping[str, Any], task: str) -> str:
    headers = ["method", "AP", *_MORE_METRICS]
    headers += ["difference to baseline [low, high]", "verdict", "seeds", "common seeds"]
    planned = len({arm["seed"] for arm in record["arms"]})
    rows = []
    for method in record["methods"]:
        scores = _scores(record, method, task)
        row = [method, _with_half_width(*interval(list(scores.values())))]
        for metric in _MORE_METRICS:
            row.append(_number(_mean(list(_scores(record, method, task, metric).values()))))
        if method == record["baseline"]:
            row += ["-", "baseline"]
            common = "-"
        else:
            gain = difference(record, method, record["baseline"], task)
            row += [_with_bounds(gain), gain.verdict]
            common = str(gain.seeds)
        rows.append(row + [f"{len(scores)} of {planned}", common])
    if _is_known(_score(record.get("teacher"), task)):
        values = [_number(_score(record["teacher"], task, m)) for m in ("AP", *_MORE_METRICS)]
        rows.append(["teacher", *values, "-", "-", "-", "-"])
    return _table(rows, headers, left=("method", "verdict"))


def _cost_table(record: Mapping[str, Any]) -> str:
    headers = ["method", "iterations", "s / step", "its seeds", "time ratio", "training minutes"]
    headers += ["peak memory MB", "memory ratio", "parameters of the losses"]
    rows = []
    for method in record["methods"]:
        seconds, memory = (
            [_mean(_costs(record, name, cost)) for name in (method, record["baseline"])]
            for cost in ("seconds_per_step", "peak_memory_mb")
        )
        spread = _costs(record, method, "seconds_per_step")
        rows.append(
            [
                method,
                _range(_costs(record, method, "iterations")),
                _number(seconds[0], ".3f"),
                f"{min(spread):.3f} to {max(spread):.3f}" if spread else "-",
                _number(_ratio(*seconds)),
                _number(_minutes(record, method), ".1f"),
                _number(memory[0], ",.0f"),
                _number(_ratio(*memory)),
                _range(_loss_parameters(record, method)),
            ]
        )
    return _table(rows, headers, left=("method",))


def _equal_time_notes(record: Mapping[str, Any]) -> List[str]:
    notes = []
    for method in record["methods"]:
        trained, at, timed = method.partition("@")
        if at:
            who = "the plain student" if trained == record["baseline"] else f"`{trained}`"
            iterations = _costs(record, method, "iterations")
            count = f": {_range(iterations)} iterations" if iterations else ""
            notes.append(f"- `{method}` is {who} trained for the time of `{timed}`{count}.")
            for task in _tasks(record):
                gain = difference(record, timed, method, task)
                notes.append(
                    f"  In that time `{timed}` has {_with_bounds(gain)} {_TASKS[task]} AP against it: "
                    f"{gain.verdict}."
                )
    return ["\n".join(notes)] if notes else []


def _gaps(record: Mapping[str, Any]) -> List[str]:
    """A line per arm that failed, never ran, or finished without an AP."""
    lines = []
    for arm in record["arms"]:
        if arm["status"] != "finished":
            # A message may have several lines, or the character that would end the code span.
            error = " ".join((arm.get("error") or "").split()).replace("`", "'")
            lines.append(f"- {_name(arm)}: {arm['status']}" + (f": `{error}`" if error else ""))
        for task in _tasks(record) if arm["status"] == "finished" else ():
            if not _is_known(_score(arm.get("results"), task)):
                lines.append(
                    f"- {_name(arm)}: has no {_TASKS[task]} AP; it is in none of the means."
                )
            if task in arm.get("collapsed", ()):
                lines.append(
                    f"- {_name(arm)}: finds nothing; its {_TASKS[task]} AP counts as 0 in the means."
                )
    return lines


def _warnings(record: Mapping[str, Any]) -> List[str]:
    """A paragraph per property that should be the same in the finished arms, and is not."""
    found = []
    for seed in sorted({arm["seed"] for arm in record["arms"]}):
        arms = [arm for arm in _finished(record) if arm["seed"] == seed]
        found += _disagreement(
            arms,
            "initial_weights",
            f"the initial weights of seed {seed} differ, so its differences between methods are "
            "not those of students that start alike",
        )
    consequence = "timings and results are not comparable across these arms"
    for key in ("hardware", "versions"):
        found += _disagreement(_finished(record), key, f"the {key} differ; {consequence}")
    return found


def _disagreement(arms: Sequence[Mapping[str, Any]], key: str, problem: str) -> List[str]:
    groups = defaultdict(list)
    for arm in arms:
        if arm.get(key):
            groups[_text(arm[key])].append(_name(arm))
    if len(groups) < 2:
        return []
    # With dozens of arms, those that differ from the most are the ones to name.
    *few, most = sorted(groups, key=lambda value: len(groups[value]))
    details = [f"{', '.join(groups[value])}: {value}" for value in few]
    return [f"**Warning:** {problem}. {'; '.join(details)}; the rest: {most}."]


def _caveats(record: Mapping[str, Any]) -> str:
    seeds = ", ".join(str(seed) for seed in sorted({arm["seed"] for arm in record["arms"]}))
    baseline = record["baseline"]
    compared = [
        method
        for method in record["methods"]
        if method != baseline
        and any(difference(record, method, baseline, task).seeds > 1 for task in _tasks(record))
    ]
    by_chance = len(compared) * (1 - _CONFIDENCE)
    return (
        f"Seeds: {seeds}. The intervals are 95 % t intervals over seeds; those of the differences "
        f"to the baseline `{baseline}` are of paired differences, arm by arm of the same seed. "
        "They do not cover the choice of the teacher or of the validation images. "
        f"Methods compared with an interval: {len(compared)}. If none of them differed from the "
        f"baseline, about {len(compared)} x 0.05 = {by_chance:.2f} of the intervals of a table "
        "would still exclude zero by chance; no correction is made for this."
    )


def _origin(record: Mapping[str, Any]) -> List[str]:
    overrides = " ".join(record.get("overrides") or [])
    lines = {
        "config": f"`{' '.join([record.get('config_file') or '-', overrides]).strip()}`",
        "command": f"`{record.get('command') or '-'}`",
    }
    for key in ("hardware", "versions"):
        values = dict.fromkeys(_text(arm[key]) for arm in _finished(record) if arm.get(key))
        lines[key] = "; ".join(values) or "-"
    return [f"- {key}: {value}" for key, value in lines.items()]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in sorted(value.items()))
    return str(value)


def _name(arm: Mapping[str, Any]) -> str:
    return f"`{arm['method']}` seed {arm['seed']}"


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str], left: Sequence[str] = ()) -> str:
    # The cells are formatted already: tabulate must not parse them back into numbers.
    return tabulate(
        rows,
        headers,
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["left" if header in left else "right" for header in headers],
    )


def _number(value: float, layout: str = ".2f") -> str:
    return format(value, layout) if _is_known(value) else "-"


def _with_half_width(mean: float, half_width: float) -> str:
    return _number(mean) + (f" ± {half_width:.2f}" if _is_known(half_width) else "")


def _with_bounds(gain: Difference) -> str:
    bounds = f" [{gain.low:+.2f}, {gain.high:+.2f}]" if _is_known(gain.half_width) else ""
    return _number(gain.mean, "+.2f") + bounds


def _range(values: Sequence[float]) -> str:
    """Counts that should be the same for all seeds: the one, or the least and the greatest."""
    if not values:
        return "-"
    least, greatest = min(values), max(values)
    return f"{least:,}" if least == greatest else f"{least:,} to {greatest:,}"


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else math.nan


# The plots


def _method_panels(
    record: Mapping[str, Any], row_height: float = _ROW
) -> Tuple[Figure, Dict[str, Axes]]:
    """One panel per task, side by side, with one row per method."""
    tasks = _tasks(record) or ["bbox"]
    methods = record["methods"]
    size = (1.5 + 5.5 * len(tasks), 1.6 + row_height * len(methods))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    panels = dict(zip(tasks, figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]))
    for axes in panels.values():
        axes.set_axisbelow(True)
        axes.grid(axis="x", alpha=0.3)
    first = panels[tasks[0]]
    has_result = [any(_scores(record, method, task) for task in tasks) for method in methods]
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
    baseline = _mean(list(_scores(record, record["baseline"], task).values()))
    if _is_known(baseline):
        label = f"baseline ({record['baseline']}): {baseline:.2f}"
        axes.axvline(baseline, color=_BASELINE, linewidth=1, zorder=0, label=label)
    teacher = _score(record.get("teacher"), task)
    if _is_known(teacher):
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
        minutes = _minutes(record, method)
        mean, half_width = interval(list(_scores(record, method, task).values()))
        if _is_known(minutes) and _is_known(mean):
            marks[method] = (minutes, mean, half_width)
    return marks


def _place_names(
    axes: Axes, marks: Mapping[str, Tuple[float, float, float]], colors: Mapping[str, str]
) -> None:
    """Write each name near its mark, where it covers least of the marks, bars and other names."""
    taken = []  # rectangles in pixels: left, bottom, right, top
    for x, mean, half_width in marks.values():
        reach = half_width if _is_known(half_width) else 0
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
