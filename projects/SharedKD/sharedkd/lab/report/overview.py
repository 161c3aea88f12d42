"""The first sections of a report: what came out, what it cost, in which settings, on what."""

import math
import os
import shlex
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

from sharedkd.config.plain import leaves
from sharedkd.engine.run import DEV_RUN_IMAGES
from sharedkd.lab.compare.summary import notes
from sharedkd.lab.runs import short, tool
from sharedkd.lab.scores import Difference, Row, difference, measured
from sharedkd.modeling.stages import Stage

from .markup import Markup, markdown, missing, scrolling, section, table, tag
from .source import RunData, Source, is_distilled
from .svg import Mark, mark_plot

__all__ = ["about", "configs", "cost", "report_command", "results", "spans", "summary"]

TASKS = {"bbox": "box AP", "segm": "mask AP"}
_UNIMPORTANT = ("train.output_dir", "train.seed")  # what every arm has for itself


# Summary


def summary(source: Source) -> Markup:
    """Up to three sentences with the numbers of ``source``."""
    # Masks first, where there are some: they are what a student with masks is for.
    tasks = dict(reversed(list(measured(source.record).items())))
    if source.is_single:
        sentences = _of_run(source.runs[0], source)
    elif tasks:
        sentences = _of_methods(source, tasks)
    else:
        total = len(source.record["arms"])
        sentences = [f"None of {total} {_unit(source)}s has a result yet: nothing can be compared."]
    text = tag("p", " ".join(sentences), class_="summary")
    return section("summary", "Summary", *_trials(source), text)


def _unit(source: Source) -> str:
    return "arm" if source.kind == "comparison" else "run"


def _trials(source: Source) -> List[Markup]:
    """What to know of runs that train.fast_dev_run cut short."""
    found = {run.method: run.max_iter for run in source.runs if run.is_trial}
    if not found:
        return []
    text = (
        f"{', '.join(found)}: {max(found.values())} iterations and {DEV_RUN_IMAGES} images "
        "(train.fast_dev_run): the figures mean nothing."
    )
    return [tag("p", tag("strong", text))]


def _of_methods(source: Source, tasks: Mapping[str, Sequence[Row]]) -> List[str]:
    record, unit = source.record, _unit(source)
    rows = next(iter(tasks.values()))
    total, done = len(record["arms"]), sum(arm["status"] == "finished" for arm in record["arms"])
    seeds = sorted({arm["seed"] for arm in record["arms"]})
    first = (
        (f"{done} {unit}{'s' * (done != 1)}" if done == total else f"{done} of {total} {unit}s")
        + f" {'is' if done == 1 else 'are'} finished"
        + (f" (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})" if unit == "arm" else "")
        + _teacher(record, tasks)
    )
    compared = [row for row in rows if row.gain and "@" not in row.method and row.gain.seeds]
    if not compared:
        own = [f"{_score(_row(tasks[task], record['baseline']))} {TASKS[task]}" for task in tasks]
        plain = _name(record["baseline"])
        return [
            f"{first}.",
            f"{plain[0].upper()}{plain[1:]} has {' and '.join(own)}.",
            "No other method has a result yet.",
        ]
    best = max(compared, key=lambda row: row.gain.mean)
    return [
        f"{first}.",
        _difference(best.method, compared, tasks, record["baseline"]),
        _price(best, _row(rows, record["baseline"]), record, next(iter(tasks))),
    ]


def _teacher(record: Mapping[str, Any], tasks: Iterable[str]) -> str:
    scores = {task: ((record.get("teacher") or {}).get(task) or {}).get("AP") for task in tasks}
    known = [f"{ap:.2f} {TASKS[task]}" for task, ap in scores.items() if _known(ap)]
    return f"; the teacher has {' and '.join(known)}" if known else ""


def _row(rows: Sequence[Row], method: str) -> Row:
    return next(row for row in rows if row.method == method)


def _name(method: str) -> str:
    """In a sentence; a comparison calls the plain student "none"."""
    return "the plain student" if method == "none" else method


def _difference(
    best: str, compared: Sequence[Row], tasks: Mapping[str, Sequence[Row]], baseline: str
) -> str:
    parts = []
    for task, rows in tasks.items():
        ours, plain = _row(rows, best), _row(rows, baseline)
        gain = ours.gain
        if gain and gain.seeds:
            more = f"{abs(gain.mean):.2f} {'more' if gain.mean >= 0 else 'less'}"
            text = f"{_score(ours)} {TASKS[task]}, {more} than {_name(baseline)} ({_score(plain)})"
            if gain.seeds > 1:
                text += f", {_bounds(gain)} paired over {gain.seeds} seeds: {gain.verdict}"
            parts.append(text)
    several = f"Of {len(compared)} methods {best} has the largest mean difference: it has"
    text = f"{several if len(compared) > 1 else f'{best} has'} {', and '.join(parts)}"
    if all(row.gain.seeds == 1 for row in compared):
        return f"{text}; one seed, so no interval."
    found = [row.gain.verdict for row in compared if row.gain.seeds > 1]
    if len(found) > 1:
        better, worse = (found.count(verdict) for verdict in ("better", "worse"))
        rest = len(found) - better - worse
        text += (
            f"; of {len(found)} methods with an interval {better} {'is' if better == 1 else 'are'} "
            f"better, {worse} worse, and {rest} {'includes' if rest == 1 else 'include'} zero"
        )
    return text + "."


def _price(best: Row, baseline: Row, record: Mapping[str, Any], task: str) -> str:
    time = best.seconds_per_step / baseline.seconds_per_step
    memory = best.peak_memory_mb / baseline.peak_memory_mb
    costs = [
        f"{ratio:.2f} times the {what}"
        for ratio, what in ((time, "time of a step"), (memory, "memory"))
        if _known(ratio)
    ]
    plain = _name(baseline.method)
    text = f"Training {best.method} takes {' and '.join(costs) or 'an unknown share'} of {plain}"
    equal = f"{baseline.method}@{best.method}"
    if equal in record["methods"]:
        gain = difference(record, best.method, equal, task)
        text += (
            f"; against the plain student trained for as long it has {_gain(gain)}: {gain.verdict}"
        )
    return text + "."


def _of_run(run: RunData, source: Source) -> List[str]:
    results = source.record["arms"][0]["results"]
    found = [
        f"{results[task]['AP']:.2f} {title}" for task, title in TASKS.items() if task in results
    ]
    of = f" of {run.max_iter}" if run.max_iter else ""
    first = f"{run.method} has trained {run.iterations_done}{of} iterations"
    first += f", and has {' and '.join(found)}" if found else ", and has not been evaluated yet"
    first += f"{_teacher(source.record, TASKS)}."
    stages = [
        f"{name} (weight {stage.weight:g}, iterations {stage.span(run.max_iter)[0]} to "
        f"{stage.span(run.max_iter)[1]})"
        for name, stage in spans(run.config)
        if run.max_iter
    ]
    second = (
        f"It is distilled in {len(stages)} stage{'s' * (len(stages) != 1)}: {', '.join(stages)}."
        if stages
        else "Nothing is known of a distillation in it."
    )
    third = (
        "One run cannot say what distillation gains; tools/compare_methods.py trains the plain "
        "student with the same seeds and gives the difference with its interval."
    )
    return [first, second, third]


def spans(config: Optional[Mapping[str, Any]]) -> Iterator[Tuple[str, Stage]]:
    """The stages of ``config`` by name, with their schedules (without their losses).

    A plain detector's config has none, nor has None.
    """
    if not is_distilled(config):
        return
    for name, node in config["model"]["stages"].items():
        if isinstance(node, Mapping):
            times = {
                k: node[k] for k in ("weight", "start", "ramp", "end", "relative") if k in node
            }
            stage = Stage(None, **times)  # type: ignore[arg-type]  # only its schedule is asked for
            if all(isinstance(x, (int, float, type(None))) for x in times.values()):
                yield str(name), stage


# Results


def results(source: Source) -> Markup:
    """A sortable table per task of ``source``, and what to know of the numbers."""
    hint = "Minutes, memory and extra parameters are those of training. A heading sorts."
    if source.kind == "comparison":
        hint = f"Intervals: 95 %, over seeds. {hint}"
    parts: List[Any] = [*_trials(source), tag("p", hint)]
    tasks = measured(source.record)
    for task, rows in tasks.items():
        parts += [tag("h3", TASKS[task]), _sortable(source, task, rows)]
    if not tasks:
        parts = [tag("p", "No run has been evaluated yet.")]
    if source.kind == "comparison":
        parts += [tag("h3", "How to read this"), markdown("\n\n".join(notes(source.record)))]
    elif not source.is_single:
        parts.append(
            tag("p", "One seed each: the differences have no interval, and prove nothing.")
        )
    return section("results", "Results", *parts)


def _sortable(source: Source, task: str, rows: Sequence[Row]) -> Markup:
    # Nothing is compared with a run alone, and of one seed each nothing can be said.
    compares, judges = not source.is_single, source.kind == "comparison"
    metrics = list(rows[0].metrics)
    headers = ["method" if judges else "run", "AP"]
    headers += ["difference to baseline"] * compares + ["verdict", "seeds"] * judges
    headers += [*metrics, "s / step", "minutes", "MB", "extra parameters"]
    head = [
        tag("th", tag("button", name, type="button"), scope="col", aria_sort="none")
        for name in headers
    ]
    body = []
    for row in rows:
        gain = (_gain(row.gain), row.gain.mean) if row.gain else ("baseline", 0.0)
        cells = [
            _cell(_score(row), row.mean),
            *[_cell(*gain)] * compares,
            *[_verdict(row.gain), _cell(len(row.scores), len(row.scores))] * judges,
            *(_cell(_number(value), value) for value in row.metrics.values()),
            _cell(_number(row.seconds_per_step, ".3f"), row.seconds_per_step),
            _cell(_number(row.minutes, ".1f"), row.minutes),
            _cell(_number(row.peak_memory_mb, ",.0f"), row.peak_memory_mb),
            _cell(_number(row.loss_parameters, ",.0f"), row.loss_parameters),
        ]
        body.append(tag("tr", tag("th", row.method, scope="row"), *cells))
    teacher = (source.record.get("teacher") or {}).get(task) or {}
    if _known(teacher.get("AP")):
        nothing = _cell("–", math.nan)
        cells = [_cell(f"{teacher['AP']:.2f}", teacher["AP"]), *[nothing] * (compares + 2 * judges)]
        cells += [_cell(_number(teacher.get(m)), teacher.get(m)) for m in metrics]
        cells += [nothing] * 4
        body.append(tag("tr", tag("th", "teacher", scope="row"), *cells, class_="teacher"))
    inner = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body), class_="sortable")
    return scrolling(f"{TASKS[task]} of the methods", inner)


def _cell(text: Any, value: Optional[float]) -> Markup:
    return tag("td", text, data_value=f"{value:.10g}" if _known(value) else "")


def _verdict(gain: Optional[Difference]) -> Markup:
    words = gain.verdict if gain else "baseline"
    return tag("td", words, class_=f"verdict {words.split()[0].rstrip(':')}")


# Cost


def cost(source: Source) -> Markup:
    """AP against training time, a plot per task of ``source``; of one run alone nothing."""
    if source.is_single:
        return Markup("")
    plots = []
    teacher = source.record.get("teacher") or {}
    for task, rows in measured(source.record).items():
        marks = [
            Mark(row.method, row.minutes, row.mean, row.half_width, i)
            for i, row in enumerate(rows)
            if _known(row.minutes) and _known(row.mean)
        ]
        if len(marks) > 1:
            best = max(mark.y for mark in marks)
            level = (teacher.get(task) or {}).get("AP")
            near = _known(level) and level < best + 1.5 * (best - min(mark.y for mark in marks))
            label = f"{TASKS[task]} against training time of {len(marks)} methods"
            interval = " (mean, 95 % interval)" * any(_known(mark.half_width) for mark in marks)
            axes = ("training minutes", f"{TASKS[task]}{interval}")
            plots.append(mark_plot(label, marks, *axes, level if near else None))
            if near:
                plots[-1] = tag("div", plots[-1], tag("p", f"Dashed: the teacher, {level:.2f}."))
    if not plots:
        return section(
            "cost", "AP against cost", tag("p", "Fewer than two runs have an AP and a time.")
        )
    return section("cost", "AP against cost", tag("div", *plots, class_="plots"))


# Settings


def configs(source: Source) -> Markup:
    """How the configs of ``source`` differ from the baseline's; of one run, from a plain config."""
    found = {method: dict(leaves(_aligned(c))) for method, c in source.configs.items()}
    base = source.record["baseline"]
    if source.is_single and base in found:
        method, (config, name) = base, (found[base], "plain config")
        plain = {
            k: v for k, v in config.items() if not k.startswith(("model.stages.", "model.teacher"))
        }
        parts = [_differences(method, plain, config, name, True)]
    else:
        if base not in found:
            return section(
                "configs", "Settings", tag("p", f"The config of the baseline {base} is not there.")
            )
        parts = [
            _differences(method, found[base], config, base, False)
            for method, config in found.items()
            if method != base
        ]
    hint = (
        "A plain student's keys begin with model; they are shown as model.student, so that they can "
        "be compared. Folders and seeds are left out; what only one has is told in one line."
    )
    return section("configs", "Settings", tag("p", hint), *parts)


def _differences(
    method: str, plain: Mapping[str, str], config: Mapping[str, str], name: str, is_open: bool
) -> Markup:
    rows: Dict[str, Tuple[List[str], List[str]]] = {}
    for key in dict.fromkeys([*plain, *config]):
        if plain.get(key) == config.get(key) or key.startswith(_UNIMPORTANT):
            continue
        start = key
        if not (key in plain and key in config):
            start = _alone(key, config if key in plain else plain)
        rest = key[len(start) + 1 :]
        for values, side in zip((plain, config), rows.setdefault(start, ([], []))):
            if key in values:
                side.append(f"{rest}={_value(values[key])}" if rest else _value(values[key]))
    title = tag("summary", f"{method}: {len(rows)} differences from {name}")
    shown = [
        (tag("code", key), *(", ".join(side) or "–" for side in sides))
        for key, sides in rows.items()
    ]
    inner = table(("key", name, method), shown, f"settings of {method}") if rows else ""
    return tag("details", title, inner, open=is_open)


def _alone(key: str, others: Mapping[str, str]) -> str:
    """The beginning of a key that tells enough: nothing there begins so; each stage is told apart."""
    parts = key.split(".")
    for size in range(3 if key.startswith("model.stages.") else 1, len(parts)):
        start = ".".join(parts[:size])
        if not any(f"{other}.".startswith(f"{start}.") for other in others):
            return start
    return key


def _value(text: str) -> str:
    """Of a setting; a path as seen from here."""
    return short(text) if os.path.isabs(text) else text


def _aligned(config: Mapping[str, Any]) -> Dict[str, Any]:
    """A plain detector's config in the shape of a pair's."""
    model = config.get("model")
    if is_distilled(config):
        parts = {key: model[key] for key in ("student", "teacher", "stages") if model.get(key)}
        return {**config, "model": parts}
    return {**config, "model": {"student": model}}


# Origin


def about(source: Source) -> Markup:
    """Versions, hardware and commands of ``source``."""
    record, runs = source.record, [run.record for run in source.runs if run.record]
    arms = [*runs, *record["arms"]]
    rows = [
        ("folder", source.folder.resolve().name),
        ("config", " ".join([record.get("config_file") or "–", *(record.get("overrides") or [])])),
        ("hardware", _distinct(arm.get("hardware") for arm in arms)),
        ("processes", _distinct(arm.get("processes") for arm in arms)),
        ("versions", _distinct(_versions(arm.get("versions")) for arm in arms)),
        ("initial weights", _distinct(arm.get("initial_weights") for arm in arms)),
    ]
    command = record.get("command")
    if command:
        commands = [tag("pre", tag("code", command), tabindex=0, aria_label="command")]
    else:
        commands = [
            tag("p", f"{run.method}: ", tag("code", run.record.get("command") or _arguments(run)))
            for run in source.runs
        ]
    again = missing("This report is made by", report_command(source))
    known = [(name, text) for name, text in rows if text.strip("–")]
    return section(
        "about",
        "Versions, hardware, commands",
        table(("what", "value"), known, "versions and hardware"),
        tag("h3", "Commands"),
        *commands,
        again,
    )


def report_command(source: Source) -> str:
    """The command line that makes the report of ``source``."""
    return shlex.join([*tool("report.py"), short(source.folder)])


def _arguments(run: RunData) -> str:
    """What Detectron2 logged of the command line, for a run whose record has none.

    A resumed run has several, the last counts.
    """
    log, start = run.folder / "log.txt", "Command line arguments: "
    if not log.is_file():
        return "no log.txt"
    lines = [x for x in log.read_text(errors="replace").split("\n") if start in x]
    return lines[-1].partition(start)[2] if lines else "log.txt does not say"


def _versions(found: Optional[Mapping[str, str]]) -> Optional[str]:
    return ", ".join(f"{k} {v}" for k, v in sorted(found.items())) if found else None


def _distinct(values: Any) -> str:
    return "; ".join(dict.fromkeys(str(x) for x in values if x)) or "–"


# Numbers


def _known(value: Optional[float]) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: Optional[float], layout: str = ".2f") -> str:
    return format(value, layout) if _known(value) else "–"


def _score(row: Row) -> str:
    return _number(row.mean) + (f" ± {row.half_width:.2f}" if _known(row.half_width) else "")


def _gain(gain: Difference) -> str:
    bounds = f" {_bounds(gain)}" if _known(gain.half_width) else ""
    return _number(gain.mean, "+.2f") + bounds


def _bounds(gain: Difference) -> str:
    return f"[{gain.low:+.2f}, {gain.high:+.2f}]"
