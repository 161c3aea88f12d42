"""The report of a comparison of methods: Markdown with tables and notes, plots, results.json.

The records are those of :mod:`~sharedkd.lab.scores`.
"""

import math
from collections import defaultdict
from operator import itemgetter
from pathlib import Path
from typing import Any, Collection, List, Mapping, Optional, Sequence, Union

from sharedkd.lab.output import write_json, write_png, write_text
from sharedkd.lab.scores import (
    CONFIDENCE,
    MORE_METRICS,
    TASKS,
    Record,
    costs_of,
    difference,
    finished_arms,
    gap_closed,
    is_known,
    level,
    mean_of,
    reached,
    rows_of,
    score_of,
    scores_of,
    tasks_of,
    text_of,
    texts_of,
)
from sharedkd.lab.tables import markdown, number, with_bounds, with_half_width
from sharedkd.methods import START

from .plots import plot_ap, plot_cost, plot_curves, plot_sizes

__all__ = ["iterations_text", "notes", "report", "write"]


def notes(record: Record) -> List[str]:
    """How to read the numbers in ``record``, as Markdown paragraphs and lists."""
    found = [*_warnings(record), *_equal_time_notes(record), *_start_notes(record)]
    found += _level_notes(record)
    gaps = _gaps(record)
    return [*found, *(["\n".join(gaps)] if gaps else []), _caveats(record)]


def report(record: Record) -> str:
    """``record`` in Markdown: warnings, a table per task, costs, gaps, and how to read it."""
    parts = ["# Comparison of distillation methods", *_warnings(record)]
    for task in tasks_of(record):
        parts += [f"## {TASKS[task].capitalize()} AP", _ap_table(record, task)]
    parts += ["## Cost", _cost_table(record), *_equal_time_notes(record)]
    parts += [*_start_notes(record), *_level_notes(record)]
    gaps = _gaps(record)
    if gaps:
        parts += ["## Arms to check", "\n".join(gaps)]
    parts += ["## How to read this", _caveats(record), "\n".join(_origin(record))]
    return "\n\n".join(parts) + "\n"


#: Name of a picture -> its title, and what draws it.
PLOTS = {
    "ap": ("AP", plot_ap),
    "curves": ("AP over the training", plot_curves),
    "cost": ("AP against training time", plot_cost),
    "sizes": ("AP by size of the objects", plot_sizes),
}


def write(record: Record, folder: Union[str, Path]) -> None:
    """Write ``results.json``, ``report.md`` and the plots, each complete or not at all."""
    target = Path(folder)
    # The measurements first: all else can be made from them again.
    write_json(target / "results.json", record)
    for name, (_, plot) in PLOTS.items():
        write_png(target / f"{name}.png", plot(record))
    links = [f"![{title}]({name}.png)" for name, (title, _) in PLOTS.items()]
    hint = (
        "The plots show intervals of the means. What all methods of a seed share widens these, but "
        "not those of the paired differences in the tables, which the verdicts rest on."
    )
    parts = [f"{report(record)}\n## Plots", hint, *links]
    write_text(target / "report.md", "\n\n".join(parts) + "\n")


def _ap_table(record: Record, task: str) -> str:
    headers = ["method", "AP", *MORE_METRICS]
    headers += ["difference to baseline [low, high]", "verdict", "gap closed"]
    headers += ["iterations to the baseline's AP", "seeds", "common seeds"]
    planned = len({arm["seed"] for arm in record["arms"]})
    rows = []
    for row in rows_of(record, task):
        gain, cells = row.gain, ["-", "baseline", "-"]
        if gain:
            closed = number(gap_closed(record, row.method, task), ".0%")
            cells = [with_bounds(gain), gain.verdict, closed]
        rows.append(
            [
                row.method,
                with_half_width(*row.interval()),
                *(number(row.mean(metric)) for metric in MORE_METRICS),
                *cells,
                iterations_text(reached(record, row.method, task)),
                f"{len(row.scores['AP'])} of {planned}",
                str(gain.count) if gain else "-",
            ]
        )
    if is_known(score_of(record.get("teacher"), task)):
        values = [number(score_of(record["teacher"], task, m)) for m in ("AP", *MORE_METRICS)]
        rows.append(["teacher", *values, *["-"] * 6])
    return markdown(rows, headers, left=("method", "verdict"))


def iterations_text(iterations: Sequence[Optional[int]]) -> str:
    """The mean of what :func:`~sharedkd.lab.scores.reached` found, and how many seeds never got there."""
    there = [i for i in iterations if i is not None]
    never = len(iterations) - len(there)
    if not iterations:
        return "-"
    mean = f"{sum(there) / len(there):,.0f}" if there else "never"
    return mean + (f" ({never} of {len(iterations)} never)" if there and never else "")


def _cost_table(record: Record) -> str:
    headers = ["method", "iterations", "s / step", "its seeds", "time ratio", "training minutes"]
    headers += ["peak memory MB", "memory ratio", "parameters of the losses", "gradient share"]
    plain = costs_of(record, record["baseline"])
    rows = []
    for method in record["methods"]:
        costs = costs_of(record, method)
        seconds = costs["seconds_per_step"]
        rows.append(
            [
                method,
                _range(costs["iterations"]),
                number(mean_of(seconds), ".3f"),
                f"{min(seconds):.3f} to {max(seconds):.3f}" if seconds else "-",
                number(_ratio(seconds, plain["seconds_per_step"])),
                number(mean_of(costs["minutes"]), ".1f"),
                number(mean_of(costs["peak_memory_mb"]), ",.0f"),
                number(_ratio(costs["peak_memory_mb"], plain["peak_memory_mb"])),
                _range(costs["loss_parameters"]),
                number(mean_of(costs["gradient_share"]), ".1%"),
            ]
        )
    share = "`gradient share`: of the distillation losses, the mean over the measurements (`train.watch_period`)."
    return markdown(rows, headers, left=("method",)) + f"\n\n{share}"


def _equal_time_notes(record: Record) -> List[str]:
    notes = []
    for method in record["methods"]:
        trained, at, timed = method.partition("@")
        if at:
            who = "the plain student" if trained == record["baseline"] else f"`{trained}`"
            iterations = costs_of(record, method)["iterations"]
            count = f": {_range(iterations)} iterations" if iterations else ""
            notes.append(f"- `{method}` is {who} trained for the time of `{timed}`{count}.")
            for task in tasks_of(record):
                gain = difference(record, timed, method, task)
                notes.append(
                    f"  In that time `{timed}` has {with_bounds(gain)} {TASKS[task]} AP against it: "
                    f"{gain.verdict}."
                )
    return ["\n".join(notes)] if notes else []


def _start_notes(record: Record) -> List[str]:
    """What every method adds to the student that only starts from its teacher."""
    if START not in record["methods"]:
        return []
    notes = [f"- `{START}` starts from the teacher, and learns without it."]
    for method in record["methods"]:
        for task in tasks_of(record) if method not in (START, record["baseline"]) else ():
            gain = difference(record, method, START, task)
            notes.append(
                f"  `{method}` has {with_bounds(gain)} {TASKS[task]} AP against it: {gain.verdict}."
            )
    return ["\n".join(notes)]


def _level_notes(record: Record) -> List[str]:
    """Which students have become as good as the teacher, and when."""
    notes = []
    for method in record["methods"]:
        found = level(record, method)
        if found:
            seeds = len(scores_of(record, method, tasks_of(record)[0]))
            when = f"after {_range(found.values())} iterations ({len(found)} of {seeds} seeds)"
            notes.append(f"- `{method}` is level with the teacher {when}.")
    if notes:
        notes.append("- Who is level with the teacher has little left to learn from it.")
    return ["\n".join(notes)] if notes else []


def _gaps(record: Record) -> List[str]:
    """A line per arm that failed, never ran, or finished without an AP."""
    lines = []
    for arm in record["arms"]:
        if arm["status"] != "finished":
            # A message may have several lines, or the character that would end the code span.
            error = " ".join((arm.get("error") or "").split()).replace("`", "'")
            lines.append(f"- {_name(arm)}: {arm['status']}" + (f": `{error}`" if error else ""))
        for task in tasks_of(record) if arm["status"] == "finished" else ():
            if not is_known(score_of(arm.get("results"), task)):
                lines.append(
                    f"- {_name(arm)}: has no {TASKS[task]} AP; it is in none of the means."
                )
            if task in arm.get("collapsed", ()):
                lines.append(
                    f"- {_name(arm)}: finds nothing; its {TASKS[task]} AP counts as 0 in the means."
                )
    return lines


def _warnings(record: Record) -> List[str]:
    """A paragraph for each property in which the finished arms differ but should not."""
    found = []
    starts = defaultdict(list)
    for arm in finished_arms(record):
        starts[arm["seed"], arm.get("inherited", 0)].append(arm)
    for (seed, _), arms in sorted(starts.items(), key=itemgetter(0)):
        found += _disagreement(
            arms,
            "initial_weights",
            f"the initial weights of seed {seed} differ, so its differences between methods are "
            "not those of students that start alike",
        )
    consequence = "timings and results are not comparable across these arms"
    for key in ("hardware", "versions"):
        found += _disagreement(finished_arms(record), key, f"the {key} differ; {consequence}")
    return found


def _disagreement(arms: Sequence[Mapping[str, Any]], key: str, problem: str) -> List[str]:
    groups = defaultdict(list)
    for arm in arms:
        if arm.get(key):
            groups[text_of(arm[key])].append(_name(arm))
    if len(groups) < 2:
        return []
    # With dozens of arms, those that differ from the most are the ones to name.
    *few, most = sorted(groups, key=lambda value: len(groups[value]))
    details = [f"{', '.join(groups[value])}: {value}" for value in few]
    return [f"**Warning:** {problem}. {'; '.join(details)}; the rest: {most}."]


def _caveats(record: Record) -> str:
    seeds = ", ".join(str(seed) for seed in sorted({arm["seed"] for arm in record["arms"]}))
    baseline = record["baseline"]
    compared = [
        method
        for method in record["methods"]
        if method != baseline
        and any(difference(record, method, baseline, task).count > 1 for task in tasks_of(record))
    ]
    by_chance = len(compared) * (1 - CONFIDENCE)
    chance = (
        f" Methods compared with an interval: {len(compared)}. If none of them differed from the "
        f"baseline, about {len(compared)} x 0.05 = {by_chance:.2f} of the intervals of a table "
        "would still exclude zero by chance; no correction is made for this."
    )
    return (
        f"Seeds: {seeds}. The intervals are 95 % t intervals over seeds; those of the differences "
        f"to the baseline `{baseline}` are of paired differences, arm by arm of the same seed. "
        "They do not cover the choice of the teacher or of the validation images."
        + (chance if compared else "")
    )


def _origin(record: Record) -> List[str]:
    overrides = " ".join(record.get("overrides") or [])
    lines = {
        "config": f"`{' '.join([record.get('config_file') or '-', overrides]).strip()}`",
        "command": f"`{record.get('command') or '-'}`",
    }
    for key in ("hardware", "versions"):
        lines[key] = "; ".join(texts_of(finished_arms(record), key)) or "-"
    return [f"- {key}: {value}" for key, value in lines.items()]


def _name(arm: Mapping[str, Any]) -> str:
    return f"`{arm['method']}` seed {arm['seed']}"


def _range(values: Collection[float]) -> str:
    """A count that should be the same for all seeds: its value, or the least and the greatest."""
    if not values:
        return "-"
    least, greatest = min(values), max(values)
    return f"{least:,}" if least == greatest else f"{least:,} to {greatest:,}"


def _ratio(values: Sequence[float], references: Sequence[float]) -> float:
    """Of their means; NaN without a reference."""
    return mean_of(values) / (mean_of(references) or math.nan)
