"""The summary of a report: what ran, the result against the baseline, further commands."""

import shlex
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from sharedkd.engine.run import DEV_RUN_IMAGES
from sharedkd.lab.runs import short, tool
from sharedkd.lab.scores import TASKS, Record, Row, difference, is_known, measured, score_of
from sharedkd.lab.tables import with_bounds, with_half_width

from .source import RunData, Source, is_distilled

__all__ = ["commands", "repairs", "score", "summary", "warnings"]

Pairs = List[Tuple[str, str]]


def summary(source: Source) -> Pairs:
    """The headings and texts of the summary."""
    # Masks first, where there are some: they are what a student with masks is for.
    tasks = dict(reversed(measured(source.record).items()))
    found = _of_run(source.runs[0]) if source.is_single else _of_methods(source, tasks)
    teacher = _scores(source.record.get("teacher"))
    return [*found, ("Teacher", teacher)] if teacher else found


def warnings(source: Source) -> List[str]:
    """Warnings about the runs, to be read before the numbers."""
    trials = {run.method: run.max_iter for run in source.runs if run.train.get("fast_dev_run")}
    found = [
        f"{method}: {count} iterations and {DEV_RUN_IMAGES} images (train.fast_dev_run): the figures "
        "mean nothing."
        for method, count in trials.items()
    ]
    for run in source.runs:
        for teacher, iteration in (run.record.get("outgrown") or {}).items():
            if source.kind == "comparison" and teacher == "teacher":
                continue  # its notes say it
            found.append(
                f"{run.method}: level with {_teacher(teacher)} after "
                f"{iteration + 1} iterations, from where on there is little left to learn from it."
            )
    return [*found, *(f"{short(run.folder)}: {x}" for run in source.runs for x in run.problems)]


def _teacher(name: str) -> str:
    return "its teacher" if name == "teacher" else f"its teacher {name}"


def repairs(source: Source) -> List[str]:
    """What was repaired in the data of the runs, a line each."""
    found = (str(x) for run in source.runs for x in run.record.get("repairs") or ())
    return list(dict.fromkeys(found))


def _scores(results: Optional[Mapping[str, Any]]) -> str:
    scores = {task: score_of(results, task) for task in reversed(TASKS)}
    return " and ".join(f"{ap:.2f} {TASKS[t]} AP" for t, ap in scores.items() if is_known(ap))


def _of_run(run: RunData) -> Pairs:
    end, stages, inherited = run.max_iter, [], run.record.get("inherited")
    for name, stage in run.stages.items():
        span = f", iterations {stage.span(end)[0]} to {stage.span(end)[1]}" if end else ""
        stages.append(f"{name} ({stage}{span})")
    return [
        ("Trained", f"{run.iterations_done}{f' of {end}' if end else ''} iterations"),
        ("Result", _scores(run.results) or "not evaluated yet"),
        ("Distilled in", ", ".join(stages) or "no stage in its config.yaml"),
        *([("Started with", f"{inherited} tensors of its teacher")] if inherited else []),
        (
            "Baseline",
            "none here. tools/compare_methods.py trains the plain student with the same seeds and "
            "measures the difference with its interval",
        ),
    ]


def _of_methods(source: Source, tasks: Mapping[str, Sequence[Row]]) -> Pairs:
    record, unit = source.record, "arms" if source.kind == "comparison" else "runs"
    arms, baseline = record["arms"], _name(record["baseline"])
    done = sum(arm["status"] == "finished" for arm in arms)
    seeds = ", ".join(str(seed) for seed in sorted({arm["seed"] for arm in arms}))
    told = f" (seeds {seeds})" if unit == "arms" else ""
    found = [("Finished", f"{done} of {len(arms)} {unit}{told}")]
    if not tasks:
        return [*found, ("Result", "none yet")]
    by_name = {task: {row.method: row for row in rows} for task, rows in tasks.items()}
    first, plain = next(iter(tasks)), record["baseline"]
    own = [f"{score(x[plain])} {TASKS[t]} AP" for t, x in by_name.items() if plain in x]
    found.append(("Baseline", f"{baseline}: {' and '.join(own) or 'no result yet'}"))
    # A student trained for another method's time is no method.
    compared = [r for r in tasks[first] if r.gain and r.gain.count and "@" not in r.method]
    if not compared:
        return [*found, ("Other methods", "no result yet")]
    best = max(compared, key=lambda row: row.gain.mean)
    label = f"Largest difference of {len(compared)}" if len(compared) > 1 else "Against it"
    for task, rows in by_name.items():
        gain = rows[best.method].gain
        if gain and gain.count:
            over = f" paired over {gain.count} seeds" if gain.count > 1 else ""
            text = (
                f"{best.method}: {score(rows[best.method])} {TASKS[task]} AP, {with_bounds(gain)}"
            )
            found.append((label, f"{text} against {baseline}{over}: {gain.verdict}"))
    if len(compared) > 1:
        verdicts = [row.gain.verdict for row in compared]
        counts = [f"{verdicts.count(x)} {x}" for x in dict.fromkeys(sorted(verdicts))]
        found.append(("All methods", ", ".join(counts)))
    return found + _price(best, by_name[first].get(plain), record, first)


def score(row: Row) -> str:
    """The mean AP of a method with its interval."""
    return with_half_width(*row.interval(), "–")


def _price(best: Row, plain: Optional[Row], record: Record, task: str) -> Pairs:
    found = []
    if plain:
        named = {"seconds_per_step": "time of a step", "peak_memory_mb": "memory"}
        ratios = {what: best.cost(name) / plain.cost(name) for name, what in named.items()}
        costs = [f"{x:.2f} times the {what}" for what, x in ratios.items() if is_known(x)]
        text = f"{' and '.join(costs) or 'an unknown share'} of {_name(plain.method)}"
        found.append((f"Cost of {best.method}", text))
    equal = f"{record['baseline']}@{best.method}"
    if equal in record["methods"]:
        gain = difference(record, best.method, equal, task)
        text = f"{with_bounds(gain, '–')} {TASKS[task]} AP against the plain student"
        found.append(("In the same time", f"{text} trained for as long: {gain.verdict}"))
    return found


def commands(source: Source, features: Path, detections: Path) -> Dict[str, str]:
    """The commands for what is not measured yet, for this report and for TensorBoard."""
    folder, found = short(source.folder), {}
    if not (detections / "detections.md").is_file():
        words = [*tool("visualize_pair.py"), folder, "--output", short(detections)]
        found["Detections, to compare two models on images"] = words
    if not (features / "features.md").is_file():
        words = [*tool("analyze_features.py"), *_measured_run(source), "--output", short(features)]
        found["Feature gaps, before and after training"] = words
    if found:
        found["Then this report once more"] = [*tool("report.py"), folder]
    board = Path(tool("x")[0]).with_name("tensorboard")
    found["TensorBoard"] = [str(board), "--logdir", folder]
    return {what: shlex.join(words) for what, words in found.items()}


def _measured_run(source: Source) -> List[str]:
    """Config and overrides of the first distilled run."""
    run = next((r for r in source.runs if is_distilled(r.config)), None)
    if run is None or not run.record.get("config_file"):
        return ["--config-file", short(run.folder / "config.yaml") if run else "CONFIG"]
    # They draw exactly the weights that the run started from; a config.yaml may list the parts
    # of a model in another order.
    found = ["--config-file", short(run.record["config_file"])]
    found += run.record.get("overrides") or []
    if Path(run.train.get("output_dir") or run.folder).resolve() != run.folder.resolve():
        found.append(f"train.output_dir={short(run.folder)}")  # it was moved
    return found


def _name(method: str) -> str:
    """In a sentence; a comparison calls the plain student "none"."""
    return "the plain student" if method == "none" else method
