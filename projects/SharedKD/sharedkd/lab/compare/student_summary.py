"""The report of a comparison of students: a table per task, AP over latency, and what they show."""

from pathlib import Path
from typing import List, Optional, Sequence

from sharedkd.lab.output import write_json, write_png, write_text
from sharedkd.lab.scores import TASKS, is_known, mean_of, rows_of, score_of, tasks_of
from sharedkd.lab.tables import markdown, number, with_bounds, with_half_width

from .plots import plot_tradeoff
from .tradeoff import EAGER, Point, Records, capacity_gaps, front, parameters_of, points

__all__ = ["STUDENTS", "report_students", "write_students"]

STUDENTS = "students.json"  #: the file of all records


def write_students(records: Records, folder: Path, command: str, budget: Optional[float]) -> None:
    """Write ``students.json``, ``report.md`` and ``tradeoff.png``, each complete or not at all.

    ``command`` made the records; ``budget`` is in milliseconds per image, None: no limit.
    """
    found = {"command": command, "latency_ms": budget, "students": records}
    write_json(folder / STUDENTS, found)
    drawn = {task: points(records, task) for task in _tasks(records)}
    teacher = {task: _teacher(records, task) for task in drawn}
    write_png(folder / "tradeoff.png", plot_tradeoff(drawn, teacher, budget))
    write_text(folder / "report.md", report_students(records, command, budget))


def report_students(records: Records, command: str, budget: Optional[float] = None) -> str:
    """``records`` in Markdown; see :func:`write_students`."""
    parts = ["# Which student?", *_warnings(records)]
    for task in _tasks(records):
        drawn = points(records, task)
        parts += [f"## {TASKS[task].capitalize()} AP", _table(records, task, drawn, budget)]
        parts += [x for x in (_best(drawn, budget, TASKS[task]), *_gaps(records, task)) if x]
    parts += ["## How to read this", _caveats(records)]
    parts += ["\n".join([*_measured(records), f"- command: `{command}`"])]
    parts += ["## AP over latency", "![AP over latency](tradeoff.png)"]
    return "\n\n".join(parts) + "\n"


def _tasks(records: Records) -> List[str]:
    return [task for task in TASKS if any(task in tasks_of(r) for r in records.values())]


def _teacher(records: Records, task: str) -> float:
    """Its AP, the mean over the students' ways to load an image."""
    found = [score_of(record.get("teacher"), task) for record in records.values()]
    return mean_of([ap for ap in found if is_known(ap)])


def _table(records: Records, task: str, drawn: Sequence[Point], budget: Optional[float]) -> str:
    headers = ["student", "parameters", "file MB", "latency ms", "AP none", "method", "AP"]
    headers += ["gain [low, high]", "verdict", "seeds", "Pareto front"]
    headers += [f"within {budget:g} ms"] if budget is not None else []
    best = {(p.student, p.method) for p in front(drawn)}
    latencies = {p.student: p.milliseconds for p in drawn}
    rows = []
    for student, record in records.items():
        deployed, milliseconds = record["deployed"] or {}, latencies[student]
        eager = f" ({EAGER})" if deployed.get("format") == EAGER else ""
        planned = len({arm["seed"] for arm in record["arms"]})
        measured = {row.method: row for row in rows_of(record, task)}
        plain = measured.pop(record["baseline"])
        for row in measured.values() or [plain]:
            marked = [m for m in dict.fromkeys((row.method, plain.method)) if (student, m) in best]
            rows.append(
                [
                    student,
                    number(parameters_of(record), ",.0f"),
                    number(deployed.get("megabytes"), ".1f") + eager,
                    number(milliseconds, ".1f") + eager,
                    with_half_width(*plain.interval()),
                    row.method,
                    with_half_width(*row.interval()),
                    with_bounds(row.gain) if row.gain else "-",
                    row.gain.verdict if row.gain else "baseline",
                    f"{len(row.scores['AP'])} of {planned}",
                    ", ".join(marked) or "-",
                    *([_within(milliseconds, budget)] if budget is not None else []),
                ]
            )
    if is_known(_teacher(records, task)):
        ap = number(_teacher(records, task))
        rows.append(["teacher", *["-"] * 5, ap, *["-"] * (len(headers) - 7)])
    return markdown(rows, headers, left=("student", "method", "verdict", "Pareto front"))


def _within(milliseconds: float, budget: float) -> str:
    if not is_known(milliseconds):
        return "-"
    return "yes" if milliseconds <= budget else "no"


def _best(drawn: Sequence[Point], budget: Optional[float], task: str) -> str:
    """Who has the highest AP within the budget."""
    if budget is None:
        return ""
    fast = front(p for p in drawn if _within(p.milliseconds, budget) == "yes")
    if fast:
        best = fast[-1]
        return (
            f"Within {budget:g} ms `{best.student}` with `{best.method}` has the highest mean {task} "
            f"AP, {best.mean:.2f}, in {best.milliseconds:.1f} ms."
        )
    text = f"No student is within {budget:g} ms"
    for fastest in front(drawn)[:1]:
        text += f": the fastest, `{fastest.student}`, takes {fastest.milliseconds:.1f} ms"
    return f"{text}."


def _gaps(records: Records, task: str) -> List[str]:
    """A sentence per capacity gap."""
    return [
        f"With `{gap.method}`, `{gap.student}` ({parameters_of(records[gap.student]):,.0f} parameters) "
        f"gains {with_bounds(gap.gains[0])} {TASKS[task]} AP, and the larger `{gap.larger}` "
        f"({parameters_of(records[gap.larger]):,.0f}) {with_bounds(gap.gains[1])}: "
        f"{with_bounds(gap.less)} more. The teacher may be too strong for `{gap.student}` (a capacity "
        "gap): try a weaker one, or an assistant between the two."
        for gap in capacity_gaps(records, task)
    ]


def _warnings(records: Records) -> List[str]:
    found = []
    for what, key in (("machines or threads", "hardware"), ("image sizes", "image")):
        values = {name: r["deployed"][key] for name, r in records.items() if r["deployed"]}
        if len({str(x) for x in values.values()}) > 1:
            each = "; ".join(f"`{name}`: {value}" for name, value in values.items())
            found.append(f"**Warning:** the latencies are of different {what}: {each}.")
    return found


def _measured(records: Records) -> List[str]:
    """What each latency was measured on."""
    lines = []
    for student, record in records.items():
        deployed = record["deployed"]
        if not deployed:
            lines.append(f"- `{student}`: no latency yet; the command without --shard measures it")
            continue
        height, width = deployed["image"]
        spread = "{median:.1f} ms ({low:.1f} to {high:.1f})".format(**deployed["milliseconds"])
        what = f"its {deployed['format']} file"
        if deployed["format"] == EAGER:
            what = f"the eager model, usually slower than a file ({deployed['why']})"
        lines.append(
            f"- `{student}`: {spread}, {what}, `{deployed['method']}` seed {deployed['seed']}, one "
            f"image of {height} x {width}, {deployed['rounds']} runs, {deployed['hardware']}"
        )
    return lines


def _caveats(records: Records) -> str:
    seeds = {arm["seed"] for record in records.values() for arm in record["arms"]}
    return (
        f"Seeds: {', '.join(map(str, sorted(seeds)))}. A gain is against the plain student of the same "
        "size, paired by seed; intervals are 95 % t intervals over seeds. On the Pareto front are the "
        "students and methods with a higher mean AP than all that are as fast; it does not know the "
        "intervals. Latencies are medians, on the CPU. Each student's folder has its own report."
    )
