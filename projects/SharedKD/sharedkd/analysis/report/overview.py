"""The first sections of a report: what came out, what it cost, in which settings, on what."""

import math
import shlex
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from ...checks.plain_config import leaves
from ...running.runs import tool
from ...stages import Stage
from ..comparison import notes
from ..scores import Difference, Row, difference, measured
from .markup import Markup, markdown, missing, scrolling, section, table, tag
from .source import RunData, Source, is_distilled
from .svg import Mark, mark_plot

__all__ = ["about", "configs", "cost", "results", "spans", "summary"]

TASKS = {"bbox": "box AP", "segm": "mask AP"}
_UNIMPORTANT = ("train.output_dir", "train.seed")  # what every arm has for itself


# Summary


def summary(source: Source) -> Markup:
    """Three sentences with the numbers."""
    tasks = measured(source.record)
    if source.kind == "run":
        sentences = _of_run(source.runs[0], source)
    elif tasks:
        task, rows = list(tasks.items())[-1]  # masks, where there are some
        sentences = _of_methods(source, task, rows)
    else:
        total = len(source.record["arms"])
        sentences = [f"None of {total} arms has a result yet, so there is nothing to compare."]
    return section("summary", "Summary", tag("p", " ".join(sentences), class_="summary"))


def _of_methods(source: Source, task: str, rows: Sequence[Row]) -> List[str]:
    record, title = source.record, TASKS[task]
    done = sum(arm["status"] == "finished" for arm in record["arms"])
    seeds = sorted({arm["seed"] for arm in record["arms"]})
    baseline = next(row for row in rows if row.method == record["baseline"])
    teacher = ((record.get("teacher") or {}).get(task) or {}).get("AP")
    first = (
        f"{done} of {len(record['arms'])} arms are finished "
        f"(seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}); "
        f"the plain student {baseline.method} has {_score(baseline)} {title}"
        + (f", the teacher {teacher:.2f}." if _known(teacher) else ".")
    )
    compared = [row for row in rows if row.gain and "@" not in row.method and row.gain.seeds]
    if not compared:
        return [first, "No other method has a result yet.", "So no difference is shown."]
    best = max(compared, key=lambda row: row.gain.mean)
    return [first, _difference(best, compared), _price(best, baseline, record, task)]


def _difference(best: Row, compared: Sequence[Row]) -> str:
    with_interval = [row.gain.verdict for row in compared if row.gain.seeds > 1]
    text = (
        f"Of the others {best.method} has the largest mean difference to it, {_gain(best.gain)} points, "
        f"paired over {best.gain.seeds} seed{'s' * (best.gain.seeds > 1)}: {best.gain.verdict}"
    )
    if len(with_interval) > 1:
        better, worse = (with_interval.count(verdict) for verdict in ("better", "worse"))
        rest = len(with_interval) - better - worse
        text += (
            f"; of {len(with_interval)} methods with an interval {better} "
            f"{'is' if better == 1 else 'are'} better, {worse} worse, and {rest} "
            f"{'includes' if rest == 1 else 'include'} zero"
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
    text = f"Training {best.method} takes {' and '.join(costs) or 'an unknown share'} of the plain student"
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
    first += f", and has {' and '.join(found)}." if found else ", and has not been evaluated yet."
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
    """The stages of a config by name, with their schedules (without their losses)."""
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
    """A sortable table per task, and what to know of the numbers."""
    hint = (
        "Intervals: 95 %, over seeds. Minutes, memory and extra parameters are those of training. "
        "A heading sorts."
    )
    parts: List[Any] = [tag("p", hint)]
    for task, rows in measured(source.record).items():
        parts += [tag("h3", TASKS[task]), _sortable(source.record, task, rows)]
    if len(parts) == 1:
        parts = [tag("p", "No run has been evaluated yet.")]
    if source.kind == "comparison":
        parts += [tag("h3", "How to read this"), markdown("\n\n".join(notes(source.record)))]
    elif source.kind == "runs":
        parts.append(
            tag("p", "One seed each: the differences have no interval, and prove nothing.")
        )
    return section("results", "Results", *parts)


def _sortable(record: Mapping[str, Any], task: str, rows: Sequence[Row]) -> Markup:
    metrics = list(rows[0].metrics)
    headers = ["method", "AP", "difference to baseline", "verdict", "seeds", *metrics]
    headers += ["s / step", "minutes", "MB", "extra parameters"]
    head = [
        tag("th", tag("button", name, type="button"), scope="col", aria_sort="none")
        for name in headers
    ]
    body = []
    for row in rows:
        cells = [
            _cell(_score(row), row.mean),
            _cell(_gain(row.gain) if row.gain else "baseline", row.gain.mean if row.gain else 0.0),
            _verdict(row.gain),
            _cell(len(row.scores), len(row.scores)),
            *(_cell(_number(value), value) for value in row.metrics.values()),
            _cell(_number(row.seconds_per_step, ".3f"), row.seconds_per_step),
            _cell(_number(row.minutes, ".1f"), row.minutes),
            _cell(_number(row.peak_memory_mb, ",.0f"), row.peak_memory_mb),
            _cell(_number(row.loss_parameters, ",.0f"), row.loss_parameters),
        ]
        body.append(tag("tr", tag("th", row.method, scope="row"), *cells))
    teacher = (record.get("teacher") or {}).get(task) or {}
    if _known(teacher.get("AP")):
        cells = [_cell(f"{teacher['AP']:.2f}", teacher["AP"]), *[_cell("–", math.nan)] * 3]
        cells += [_cell(_number(teacher.get(m)), teacher.get(m)) for m in metrics]
        cells += [_cell("–", math.nan)] * 4
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
    """AP against training time, a plot per task."""
    plots = []
    teacher = source.record.get("teacher") or {}
    for task, rows in measured(source.record).items():
        marks = [
            Mark(row.method, row.minutes, row.mean, row.half_width, i)
            for i, row in enumerate(rows)
            if _known(row.minutes) and _known(row.mean)
        ]
        if marks:
            best = max(mark.y for mark in marks)
            level = (teacher.get(task) or {}).get("AP")
            near = _known(level) and level < best + 1.5 * (best - min(mark.y for mark in marks))
            label = f"{TASKS[task]} against training time of {len(marks)} methods"
            axes = ("training minutes", f"{TASKS[task]} (mean, 95 % interval)")
            plots.append(mark_plot(label, marks, *axes, level if near else None))
            if near:
                plots[-1] = tag("div", plots[-1], tag("p", f"Dashed: the teacher, {level:.2f}."))
    if not plots:
        return section("cost", "AP against cost", tag("p", "No run has both an AP and a time yet."))
    return section("cost", "AP against cost", tag("div", *plots, class_="plots"))


# Settings


def configs(source: Source) -> Markup:
    """What differs between the arms' configs and the baseline's."""
    found = {method: dict(leaves(_aligned(c))) for method, c in source.configs.items()}
    base = source.record["baseline"]
    if source.kind == "run" and base in found:
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
        "be compared. Folders and seeds are left out."
    )
    return section("configs", "Settings", tag("p", hint), *parts)


def _differences(
    method: str, plain: Mapping[str, str], config: Mapping[str, str], name: str, is_open: bool
) -> Markup:
    rows = [
        (tag("code", key), plain.get(key, "–"), config.get(key, "–"))
        for key in dict.fromkeys([*plain, *config])
        if plain.get(key) != config.get(key) and not key.startswith(_UNIMPORTANT)
    ]
    title = tag("summary", f"{method}: {len(rows)} settings differ from {name}")
    inner = table(("key", name, method), rows, f"settings of {method}") if rows else ""
    return tag("details", title, inner, open=is_open)


def _aligned(config: Mapping[str, Any]) -> Dict[str, Any]:
    """A plain detector's config in the shape of a pair's."""
    model = config.get("model")
    if is_distilled(config):
        parts = {key: model[key] for key in ("student", "teacher", "stages") if model.get(key)}
        return {**config, "model": parts}
    return {**config, "model": {"student": model}}


# Origin


def about(source: Source) -> Markup:
    """Versions, hardware and commands."""
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
            tag("p", f"{run.method}: ", tag("code", _arguments(run))) for run in source.runs
        ]
    again = missing("This report is made by", shlex.join([*tool("report.py"), str(source.folder)]))
    known = [(name, text) for name, text in rows if text.strip("–")]
    return section(
        "about",
        "Versions, hardware, commands",
        table(("what", "value"), known, "versions and hardware"),
        tag("h3", "Commands"),
        *commands,
        again,
    )


def _arguments(run: RunData) -> str:
    """What Detectron2 logged of the command line; a resumed run has several, the last counts."""
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
    bounds = f" [{gain.low:+.2f}, {gain.high:+.2f}]" if _known(gain.half_width) else ""
    return _number(gain.mean, "+.2f") + bounds
