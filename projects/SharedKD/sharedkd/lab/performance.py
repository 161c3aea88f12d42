"""Tables and a plot of what tools/benchmark.py measured: for the console, and docs/performance.md.

A result is a plain dict as ``tools/benchmark.py --json`` writes it, see
:func:`~sharedkd.lab.benchmark.measure`.
"""

import json
import os
import re
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from matplotlib.figure import Figure
from tabulate import tabulate

from sharedkd.files import replace

__all__ = [
    "aims",
    "document",
    "growth",
    "keep",
    "loss_operations",
    "operations",
    "plot_parts",
    "rivals",
    "summary",
    "table",
    "variants",
]

BEGIN, END = "<!-- benchmark tables -->", "<!-- end of benchmark tables -->"
KEPT = ("teacher_weights", "teacher_maps", "gradients")

Result = Mapping[str, Any]


def _overhead(applies: Callable[[Result], bool]) -> Callable[[Result], Optional[float]]:
    return lambda result: result["overhead"] if applies(result) else None


def _on_cpu(teacher: str) -> Callable[[Result], bool]:
    return lambda result: (result["device"], result["teacher_precision"]) == ("cpu", teacher)


def _beyond_kept(result: Result) -> float:
    memory = result["memory"]
    return memory["over_student_mb"]["distill"] - sum(memory[f"{x}_mb"] for x in KEPT)


def _time_of(method: str) -> Callable[[Result], Optional[float]]:
    return lambda result: result["ratios"].get(f"distill/{method}", {}).get("median")


def _memory_of(method: str) -> Callable[[Result], Optional[float]]:
    def ratio(result: Result) -> Optional[float]:
        over = result["memory"]["over_student_mb"]
        return over["distill"] / over[method] if method in over else None

    return ratio


# What a step was to reach: title, at most, how it is written, and its number of a benchmark, if it has one.
AIMS: Tuple[Tuple[str, float, str, Callable[[Result], Optional[float]]], ...] = (
    ("overhead, teacher in float32 on a CPU", 0.95, ".2f", _overhead(_on_cpu("float32"))),
    ("overhead, teacher in bfloat16 on a CPU", 0.80, ".2f", _overhead(_on_cpu("bfloat16"))),
    ("overhead on a GPU", 0.85, ".2f", _overhead(lambda result: result["device"] == "cuda")),
    ("losses / step", 0.02, ".3f", lambda result: result["ratios"]["losses"]["median"]),
    ("MB beyond weights, maps and gradients", 0, ".0f", _beyond_kept),
    ("time of SemCKD", 0.76, ".2f", _time_of("semckd")),  # 10.5 h of 13.8 h, as published
    ("extra memory of SemCKD", 0.84, ".2f", _memory_of("semckd")),  # 3.8 of 4.5 GB, as published
    *((f"time of {x.upper()}", 1.0, ".2f", _time_of(x)) for x in ("fgd", "mgd")),
    ("time of ReviewKD", 1.0, ".2f", _time_of("reviewkd")),
)
# Of Okabe and Ito's palette, which people with any colour vision can tell apart.
PARTS = dict(
    teacher="#009E73",
    student_forward="#56B4E9",
    losses="#D55E00",
    backward="#0072B2",
    optimizer="#CC79A7",
    data="#999999",
    rest="#000000",
)


def table(result: Mapping[str, Any]) -> str:
    """A Markdown table of one benchmark's ``result``: its arms, ratios and parts."""
    whole = result["parts"]["whole"]
    over = result["memory"]["over_student_mb"]
    student = result["seconds"]["student"]["median"]
    rows = [
        [
            name,
            f"{x['median']:.3f}",
            f"{x['low']:.3f} to {x['high']:.3f}",
            f"{x['median'] / student:.3f}",
            f"{over[name]:,.0f}" if name in over else "-",
        ]
        for name, x in result["seconds"].items()
    ]
    headers = ["arm", "seconds", "from, to", "of the student's step", "MB over the student"]
    lines = [
        _table(rows, headers),
        "",
        *(f"{name}: {_ratio(x)}" for name, x in result["ratios"].items()),
        "",
        "parts of a distillation step: "
        + ", ".join(
            f"{k} {100 * x / whole:.1f} %" for k, x in result["parts"].items() if k != "whole"
        ),
    ]
    return "\n".join(lines)


def summary(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per benchmark: overhead, share of the losses, memory.

    Args:
        results: name -> what ``tools/benchmark.py --json`` wrote.
    """
    headers = ["benchmark", "overhead", "its floor", "own plain step / Detectron2's"]
    headers += ["distill / own plain step", "teacher / eager"]
    headers += ["losses / step", "their maps copied / step"]
    headers += ["MB over own plain step", "MB over Detectron2's"]
    headers += ["MB of the teacher's weights, its maps, gradients of the student's"]
    rows = []
    for name, result in results.items():
        ratios, memory = result["ratios"], result["memory"]
        peaks = memory["peak_mb"]
        rows.append(
            [
                name,
                *(_ratio(ratios[k]) for k in ("overhead", "floor", "plain", "over_plain")),
                *(_ratio(ratios[k]) for k in ("teacher", "losses", "copies")),
                f"{memory['over_student_mb']['distill']:,.0f} ± {_starts_differ(memory):,.0f}",
                f"{peaks['distill'] - peaks['student']:,.0f}",
                ", ".join(f"{memory[f'{x}_mb']:,.0f}" for x in KEPT),
            ]
        )
    return _table(rows, headers)


def _starts_differ(memory: Mapping[str, Any]) -> float:
    """Half of what the difference of two peaks varies by from start to start, in MB."""
    starts = [memory["starts_mb"][arm] for arm in ("student_sharedkd", "distill")]
    return sum(max(mb) - min(mb) for mb in starts) / 2


def aims(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for each of :data:`AIMS` that a benchmark has a number for, and who missed it.

    Args:
        results: see :func:`summary`.
    """
    rows = []
    for title, limit, form, number in AIMS:
        found = {
            name: value for name, result in results.items() if (value := number(result)) is not None
        }
        if not found:
            continue
        low, high = (format(x, form) for x in (min(found.values()), max(found.values())))
        missed = [
            f"{name} ({value:{form}})"
            for name, value in found.items()
            if float(format(value, form)) > limit
        ]
        reached = low if low == high else f"{low} to {high}"
        rows.append([title, f"{limit:{form}}", reached, ", ".join(missed) or "-"])
    return _table(rows, ["aimed at", "at most", "measured, medians", "missed by"])


def loss_operations(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per benchmark: what the losses are made of, forward and backward.

    Args:
        results: see :func:`summary`.
    """
    rows = []
    for name, result in results.items():
        found = result["loss_operations"]
        shares = [f"{op.split('::')[-1]} {100 * x:.0f} %" for op, x in found["shares"].items()]
        seconds = result["seconds"]["losses/distill"]["median"]
        rows.append([name, f"{1e3 * seconds:.0f}", f"{found['calls']:,}", ", ".join(shares)])
    return _table(rows, ["losses of", "ms alone", "calls", "of their time, when profiled"])


def operations(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per benchmark: what kinds of operations a distillation step spends its time on.

    Args:
        results: see :func:`summary`.
    """
    kinds = list(next(iter(results.values()))["operations"])
    rows = [
        [name, *(f"{100 * result['operations'][kind]:.1f} %" for kind in kinds)]
        for name, result in results.items()
    ]
    return _table(rows, ["of a distillation step", *kinds])


def rivals(result: Mapping[str, Any]) -> str:
    """One row per rival method in ``result``: how a Shared-KD step compares with one of it.

    They are those of ``--methods``, on the same pair.
    """
    headers = [
        "method",
        "seconds a step",
        "Shared-KD / method",
        "losses alone, s",
        "MB over the student",
    ]
    seconds, over = result["seconds"], result["memory"]["over_student_mb"]
    rows = []
    for name in _methods(result):
        rows.append(
            [
                "Shared-KD" if name == "distill" else name,
                f"{seconds[name]['median']:.3f}",
                "-" if name == "distill" else _ratio(result["ratios"][f"distill/{name}"]),
                f"{seconds[f'losses/{name}']['median']:.3f}",
                f"{over[name]:,.0f}",
            ]
        )
    return _table(rows, headers)


def variants(result: Mapping[str, Any]) -> str:
    """One row per other way to compute the same step: what one means of the step's speed gives.

    They are those of ``--variant``, by which ``result`` was measured.
    """
    headers = ["with", "seconds a step", "of the step's", "MB over the plain step as it is"]
    seconds, over = result["seconds"], result["memory"]["over_student_mb"]
    rows = []
    for name in ["distill", *_variants(result)]:
        share = "-" if name == "distill" else _ratio(result["ratios"][name])
        label = "the step as it is" if name == "distill" else f"`{name}`"
        rows.append([label, f"{seconds[name]['median']:.3f}", share, f"{over[name]:,.0f}"])
    return _table(rows, headers)


def _methods(result: Mapping[str, Any]) -> List[str]:
    return [name for name in result["memory"]["over_student_mb"] if "=" not in name]


def _variants(result: Mapping[str, Any]) -> List[str]:
    return [name for name in result["memory"]["over_student_mb"] if "=" in name]


def growth(result: Mapping[str, Any]) -> str:
    """One row per input size or number of levels: what distillation adds to the student's step.

    Only a ``result`` that was measured with ``--growth`` has them.
    """
    headers = ["images", "shorter side", "levels", "overhead", "student's step, s"]
    headers += ["distillation adds, s", "of it losses, s", "distill / own plain step", "MB it adds"]
    rows = []
    for case in result["growth"]:
        student, distill, losses = (
            case["seconds"][arm] for arm in ("student_sharedkd", "distill", "losses/distill")
        )
        sizes = [str(case[key]) for key in ("batch_size", "image_size", "levels")]
        times = [f"{x:.3f}" for x in (student, distill - student, losses, distill / student)]
        rows.append([*sizes, f"{case['overhead']:.2f}", *times, f"{case['over_student_mb']:,.0f}"])
    return _table(rows, headers)


def plot_parts(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Stacked bars: where the time of a distillation step goes, one bar per benchmark.

    A bar is as long as the benchmark's ``overhead``; 1 is Detectron2's plain step and teacher.

    Args:
        results: benchmark's name -> result.
    """
    figure = Figure(figsize=(10, 1.1 + 0.45 * len(results)), layout="constrained")
    axes = figure.subplots()
    for row, result in enumerate(results.values()):
        left, scale = 0.0, result["overhead"] / sum(result["parts"][part] for part in PARTS)
        for part, colour in PARTS.items():
            width = scale * result["parts"][part]
            axes.barh(row, width, left=left, color=colour, label=part if row == 0 else None)
            left += width
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1, linestyle=":")
    axes.set_xlabel("a distillation step over Detectron2's plain step and teacher")
    handles = axes.get_legend_handles_labels()[0]
    labels = [label.replace("_", " ") for label in PARTS]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(PARTS), fontsize="small")
    return figure


def keep(folder: Path, records: Path) -> None:
    """Put what was measured beside the records of other machines, over older ones of the same.

    Args:
        folder: holds ``<name>.json`` files.
        records: of all machines; a file becomes ``<machine>/<name>.json`` in it.

    Raises:
        ValueError: no such files.
    """
    found = sorted(folder.glob("*.json"))
    if not found:
        raise ValueError(f"no *.json in {folder}")
    for path in found:
        machine = re.sub(r"\W+", "_", json.loads(path.read_text())["hardware"]).strip("_").lower()
        os.makedirs(records / machine, exist_ok=True)
        shutil.copyfile(path, records / machine / path.name)


def document(records: Path, path: Path) -> None:
    """Put the tables of all benchmarks between the markers of a Markdown file, by machine.

    Args:
        records: see :func:`keep`.
        path: the document; plots go to ``images/`` beside it.

    Raises:
        ValueError: no benchmarks, or no markers.
    """
    text, files = path.read_text(), sorted(records.glob("*/*.json"))
    if not files or BEGIN not in text or END not in text:
        raise ValueError(f"no */*.json in {records}, or no {BEGIN} ... {END} in {path}")
    os.makedirs(path.parent / "images", exist_ok=True)
    blocks: List[str] = []
    for machine, some in groupby(files, lambda file: file.parent.name):
        results = {file.stem: json.loads(file.read_text()) for file in some}
        plot = f"images/benchmark_{machine}.png"
        replace(str(path.parent / plot), lambda f: plot_parts(results).savefig(f, dpi=120))
        blocks += [f"### {next(iter(results.values()))['hardware']}", *_section(results, plot)]
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    filled = "\n\n".join([head + BEGIN, *blocks, END + tail])
    replace(str(path), lambda f: f.write(filled.encode()))


def _section(results: Mapping[str, Dict[str, Any]], plot: str) -> List[str]:
    """The tables of one machine."""
    blocks = [aims(results), summary(results), f"![Parts of a step]({plot})"]
    blocks += [operations(results), loss_operations(results)]
    for name, result in results.items():
        if len(_methods(result)) > 1:
            blocks.append(f"{name}, beside other methods:\n\n{rivals(result)}")
        if _variants(result):
            blocks.append(f"{name}, in other ways:\n\n{variants(result)}")
        if "growth" in result:
            blocks.append(f"{name}, other sizes:\n\n{growth(result)}")
    return [*blocks, *(_circumstances(name, result) for name, result in results.items())]


def _circumstances(name: str, result: Dict[str, Any]) -> str:
    height, width = result["images"][0]
    deviation = max(result["teacher_deviation"].values())
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    several = "".join(
        f" One process over several, {arm}: {x:.3f}."
        for arm, x in result.get("efficiency", {}).items()
    )
    return (
        f"`{name}`: {len(result['images'])} images of {height} x {width}, step in "
        f"{result['precision']}, teacher in {result['teacher_precision']} (its maps of a random image "
        f"change by {100 * deviation:.2g} % at most); {versions}. Command: "
        f"`{' '.join(result['command'])}`.{several}"
    )


def _ratio(x: Mapping[str, float]) -> str:
    return f"{x['median']:.3f} ({x['low']:.3f} to {x['high']:.3f})"


def _table(rows: List[List[str]], headers: List[str]) -> str:
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
