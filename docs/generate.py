"""What the documentation says about keys, options and methods, read from the code that has them.

Run as a program, it fills the tables of MODEL_ZOO.md and of docs/*.md from the code and from docs/results, and draws
docs/images/curves.svg.
"""

import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Sequence, Tuple, get_type_hints

from matplotlib import rcParams
from matplotlib.figure import Figure

from sharedkd import losses
from sharedkd.config import defaults
from sharedkd.config.structure import defaults_of
from sharedkd.data.loader import build_train_loader
from sharedkd.lab import performance
from sharedkd.lab.compare.plots import draw_curves
from sharedkd.lab.compare.summary import iterations_text
from sharedkd.lab.scores import (
    TASKS,
    Difference,
    curve_of,
    difference,
    gains,
    gap_closed,
    mean_of,
    reached,
    rows_of,
    score_of,
    scores_of,
    tasks_of,
)
from sharedkd.lab.tables import number, with_bounds
from sharedkd.losses import DistillationLoss
from sharedkd.methods import PLAIN, START, known_methods
from sharedkd.modeling.stages import Stage
from sharedkd.modeling.teachers.frozen import FrozenTeacher

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/results"
#: Comparisons of a teacher's precisions, each on one machine and with a teacher of its own.
PRECISION = ("precision", "precision_rounded")

#: Comparisons by :doc:`protocol`, one for each set and pair.
PAIRS = (
    "facade",
    "animals",
    "animals_600",
    "animals_scratch",
    "animals_scratch_600",
    "cards",
    "cards_600",
    "cards_80",
    "bccd_fifth",
    "quickstart",
)

#: Those of full length, whose seeds are counted together.
TOGETHER = ("facade", "animals", "cards", "cards_80")
LOSSES = "a loss: the mean of all that were run"  #: a row of the tables of several comparisons

__all__ = ["fill", "tables"]


def tables() -> Dict[Tuple[str, str], str]:
    """(page, name of its markers) -> the table between them, read from the code or the records."""
    of_config = {
        "train_keys": _table("key | default | meaning", train_keys()),
        "data_keys": _table("key | default | meaning", data_keys()),
        "loader_keys": _table(
            "key | default | meaning", options(build_train_loader, "dataloader.train")
        ),
        "teacher_keys": _table("key | default | meaning", options(FrozenTeacher, "model.teacher")),
        "stage_keys": _table("key | default | meaning", options(Stage, "model.stages.NAME")),
    }
    of_methods = {
        "loss_options": "\n\n".join(_loss(name, cls) for name, cls in loss_classes().items()),
        "methods": _table("recipe | publication | families | parameters of the losses", methods()),
    }
    return {
        **{("docs/config.md", name): table for name, table in of_config.items()},
        **{("docs/methods.md", name): table for name, table in of_methods.items()},
        **measured(),
    }


def train_keys() -> List[Tuple[str, str, str]]:
    """Key, default and meaning of everything in ``train``."""
    return list(_commented(defaults.Train, "train."))


def data_keys() -> List[Tuple[str, str, str]]:
    """The same of own data's keys."""
    return list(_commented(defaults.Data, "data."))


def _commented(structure: type, prefix: str) -> Iterator[Tuple[str, str, str]]:
    """The fields of a dataclass with their defaults and the comments beside or above them."""
    source = textwrap.dedent(inspect.getsource(structure))
    comments = {
        token.start[0]: token.string.lstrip("#: ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    types, values = get_type_hints(structure), defaults_of(structure)
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    for node in fields:
        name = node.target.id
        if is_dataclass(types[name]):
            yield from _commented(types[name], f"{prefix}{name}.")
            continue
        beside = [x for x in range(node.lineno, node.end_lineno + 1) if x in comments]
        first = node.lineno
        while source.splitlines()[first - 2].lstrip().startswith("#"):
            first -= 1
        lines = beside or range(first, node.lineno)
        yield f"{prefix}{name}", repr(values[name]), " ".join(comments[x] for x in lines)


def options(cls: Callable, prefix: str) -> List[Tuple[str, str, str]]:
    """Name, default and meaning of a class's or function's arguments, from signature and docstring."""
    meanings = arguments(_documentation(cls))
    return [
        (
            f"{prefix}.{name}" if prefix else name,
            "required" if parameter.default is parameter.empty else repr(parameter.default),
            meanings.get(name, ""),
        )
        for name, parameter in inspect.signature(cls).parameters.items()
    ]


def arguments(docstring: str) -> Dict[str, str]:
    """Argument -> meaning, of a docstring's "Args:" section; several may share one line."""
    section = re.search(r"^( *)Args:\n(.*?)(?=^\1\S|\Z)", docstring, re.M | re.S)
    found: Dict[str, str] = {}
    names: List[str] = []
    if not section:
        return found
    indent = len(section[1]) + 4
    for line in section[2].splitlines():
        entry = re.match(rf" {{{indent}}}([*\w][\w, *]*?)(?: \(.*?\))?:\s*(.*)", line)
        if entry:
            names = [name.strip("* ") for name in entry[1].split(",")]
        text = entry[2] if entry else line.strip()
        for name in names:
            found[name] = f"{found.get(name, '')} {text}".strip()
    return found


def _documentation(cls: Callable) -> str:
    """The class's docstring and its constructor's."""
    return "\n".join(inspect.cleandoc(each.__doc__ or "") for each in (cls, cls.__init__))


def loss_classes() -> Dict[str, type]:
    """Every distillation loss of the package by name."""
    found = {name: getattr(losses, name) for name in losses.__all__}
    return {
        name: cls
        for name, cls in found.items()
        if isinstance(cls, type)
        and issubclass(cls, DistillationLoss)
        and cls is not DistillationLoss
    }


def _loss(name: str, cls: type) -> str:
    base = {key: meaning for key, _, meaning in options(DistillationLoss, "")}
    rows = []
    for key, default, meaning in options(cls, ""):
        if meaning.startswith("see :class:`DistillationLoss`") or not meaning:
            meaning = base.get(key, meaning)
        elif meaning.startswith("see :class:"):
            other = re.match(r"see :class:`(\w+)`", meaning)[1]
            meaning = dict((k, m) for k, _, m in options(getattr(losses, other), ""))[key]
        rows.append((key, default, meaning))
    first = inspect.cleandoc(cls.__doc__).split("\n\n")[0]
    return f"### {name}\n\n{_plain(first)}\n\n" + _table("option | default | meaning", rows)


def methods() -> List[Tuple[str, str, str, str]]:
    """Name, publication, families, and parameters for the published pairs, of every recipe."""
    rows = []
    for method in known_methods():
        counts: Dict[str, None] = {}
        for family in method.stages:
            count = method.parameters(family)
            counts[f"{count / 1e6:.2f} M" if count else "0"] = None
        families = ", ".join(method.stages)
        rows.append((method.name, method.paper, families, " / ".join(counts)))
    return rows


def _table(header: str, rows: List[Tuple[str, ...]]) -> str:
    """Markdown; names and defaults are code, what begins with "the" is not."""
    titles = header.split(" | ")
    code = {0} | {i for i, title in enumerate(titles) if title == "default"}
    lines = [f"| {header} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [
            f"`{x}`" if i in code and not x.startswith("the ") else _plain(x)
            for i, x in enumerate(row)
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A docstring's markup as Markdown."""
    text = re.sub(r":\w+:`~?\.?([^`]*)`", r"`\1`", text).replace("``", "`")
    return " ".join(text.split())


def measured() -> Dict[Tuple[str, str], str]:
    """(page, name of its markers) -> the table between them, from the records of docs/results."""
    found = {}
    for name in PAIRS:
        record = _record(name)
        found["MODEL_ZOO.md", name] = _zoo(record)
        found["docs/results.md", name] = _over_training(record)
    photographs = [name for name in PAIRS if name != "quickstart"]
    for marker, names in {"together": TOGETHER, "all lengths": photographs}.items():
        found["docs/results.md", marker] = _together([_record(name) for name in names])
    found["docs/schemes.md", "schemes"] = performance.schemes(_record("schemes"))
    speeds = {x.stem: json.loads(x.read_text()) for x in sorted(RESULTS.glob("performance/*.json"))}
    found["docs/performance.md", "benchmark tables"] = performance.page(speeds)
    found["docs/performance.md", "precision"] = _precision([_record(name) for name in PRECISION])
    return found


def _record(name: str) -> Dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _precision(records: Sequence[Mapping[str, Any]]) -> str:
    """What the teacher's precision does to AP: a row for each machine, and one for all seeds."""
    exact = "shared_kd"
    lower = f"{exact}:model.teacher.precision=bfloat16"
    together = _merged(records)
    rows = []
    for record in [*records, together]:
        whole = record is together
        row = ["together" if whole else record["arms"][0]["hardware"]]
        row.append(str(len(scores_of(record, lower, "bbox"))))
        for task in ("bbox", "segm"):
            for method in (exact, lower):
                mean = mean_of(scores_of(record, method, task).values())
                row.append("" if whole else number(mean, ".1f"))
            row.append(_gain(difference(record, lower, exact, task)))
        rows.append(tuple(row))
    titles = [
        f"{task} AP, {x}" for task in ("box", "mask") for x in ("float32", "bfloat16", "difference")
    ]
    return _table(" | ".join(["machine", "seeds", *titles]), rows)


def _together(records: Sequence[Mapping[str, Any]]) -> str:
    """What each method gains over the runs of several comparisons, paired by comparison and seed.

    The last row is of the losses on top of the start: in each pair of runs, their mean.
    """
    merged, rows = _merged(records), []
    methods = list(dict.fromkeys(x for record in records for x in record["methods"]))
    losses = [x for x in methods if not x.startswith((PLAIN, START)) and "inherit_images" not in x]
    for name, those in [*((x, [x]) for x in methods if x != PLAIN), (LOSSES, losses)]:
        sets = sum(any(scores_of(record, x, "bbox") for x in those) for record in records)
        cells = []
        for base in (PLAIN, START):
            each: Dict[Any, List[float]] = {}
            for method in those if name != base else ():
                for seed, gain in gains(merged, method, base, "bbox").items():
                    each.setdefault(seed, []).append(gain)
            gain = Difference.of(mean_of(x) for x in each.values())
            cells.append(f"{_gain(gain)} ({gain.count})" if each else "-")
        if sets > 1 or name == LOSSES:
            rows.append((name, str(sets), *cells))
    bases = [f"against `{x}` [95 % interval] (runs)" for x in (PLAIN, START)]
    return _table(" | ".join(["box AP", "comparisons", *bases]), rows)


def _merged(records: Sequence[Mapping[str, Any]]) -> Dict[str, Any]:
    """The arms of several records; a seed is the place of its record and its own number."""
    arms = [
        {**arm, "seed": (number, arm["seed"])}
        for number, record in enumerate(records)
        for arm in record["arms"]
    ]
    return {"arms": arms}


def _over_training(record: Mapping[str, Any]) -> str:
    """AP of every method at each evaluation, the mean over its seeds."""
    tables = []
    for task in tasks_of(record):
        rows = []
        for row in rows_of(record, task):
            curve = curve_of(record, row.method, task)
            means = (number(ap, ".1f") for _, ap in curve)
            rows.append((row.method, str(len(row.scores["AP"])), *means))
        titles = [f"{TASKS[task]} AP", "seeds", *(f"after {i}" for i, _ in curve)]
        tables.append(_table(" | ".join(titles), rows))
    return "\n\n".join(tables)


def _zoo(record: Mapping[str, Any]) -> str:
    """Every finished method of a comparison: AP, what it gains, what it costs."""
    tasks, bases = tasks_of(record), [x for x in (PLAIN, START) if x in record["methods"]]
    titles, teacher = ["recipe"], ["the teacher"]
    for task in tasks:
        titles += [f"{TASKS[task]} AP", *(f"against `{x}` [95 % interval]" for x in bases)]
        titles += ["gap closed", "iterations to the AP of `none`"]
        teacher += [number(score_of(record["teacher"], task), ".1f"), *["-"] * (len(bases) + 2)]
    titles += ["training memory MB", "parameters of the losses", "seeds"]
    rows = []
    for of_method in zip(*(rows_of(record, task) for task in tasks)):
        first, cells = of_method[0], []
        for task, row in zip(tasks, of_method):
            cells.append(number(row.mean(), ".1f"))
            for base in bases:
                own = row.method in (PLAIN, base)
                cells.append("-" if own else _gain(difference(record, row.method, base, task)))
            closed, fast = gap_closed(record, row.method, task), reached(record, row.method, task)
            plain = row.method == PLAIN
            cells += ["-", "-"] if plain else [number(closed, ".0%"), iterations_text(fast)]
        costs = [number(first.cost(x), ",.0f") for x in ("peak_memory_mb", "loss_parameters")]
        rows.append((Path(first.method).name, *cells, *costs, str(len(first.scores["AP"]))))
    rows.append((*teacher, "-", "-", "1"))
    return _table(" | ".join(titles), rows)


def _gain(gain: Difference) -> str:
    return with_bounds(gain, layout="+.1f")


def fill(page: str, name: str, table: str) -> str:
    """A page's text with another table between ``<!-- name -->`` and ``<!-- end of name -->``.

    Raises:
        ValueError: the page does not have these markers once.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"no single {begin} and {end}")
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"


def curves() -> Figure:
    """AP over the iterations of every comparison of photographs, a panel for each, three in a row."""
    records = {name: _record(name) for name in PAIRS if name != "quickstart"}
    rows = -(-len(records) // 3)
    figure = Figure(figsize=(19.5, 5.2 * rows), layout="constrained")
    panels = [*figure.subplots(rows, 3, squeeze=False).flat]
    for axes, (name, record) in zip(panels, records.items()):
        draw_curves(axes, record, "bbox")
        axes.set_title(name)
    for axes in panels[len(records) :]:
        axes.set_axis_off()
    return figure


if __name__ == "__main__":
    # Equal records make equal files.
    rcParams.update({"svg.hashsalt": "sharedkd", "svg.fonttype": "none"})
    curves().savefig(ROOT / "docs/images/curves.svg", metadata={"Date": None})
    for (page, name), table in tables().items():
        path = ROOT / page
        path.write_text(fill(path.read_text(), name, table))
