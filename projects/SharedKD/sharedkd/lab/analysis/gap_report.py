"""What features.json says, as heat maps, curves over training, and words.

All functions read that record, a plain dict:

* "images", "minibatch", "positions", "normalize": how it was measured, see :mod:`.gaps`;
* "checkpoints": one mapping per state of the student, in the order of training, with "name", "file",
  "iteration" (None if unknown) and "taps": tap -> :meth:`Gaps.record() <.gaps.Gaps.record>`;
* "change": tap -> measure -> quantity -> :func:`~.gaps.paired` of the last checkpoint and the first;
* "initial_is_the_runs", "channels" (tap -> who -> stride -> channels), "pictures", "command".
"""

from typing import Any, List, Mapping, Optional

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from tabulate import tabulate

from .gaps import QUANTITIES
from .similarity import MEASURES

__all__ = ["draw_heat_maps", "draw_training", "words"]

NAMES = {"mse": "MSE", "cosine": "cosine", "cka": "linear CKA"}
# What the bright cells of a heat map are.
BRIGHT = {"mse": "far apart", "cosine": "alike", "cka": "alike"}
GAPS = {"mse": "MSE", "cosine": "1 - cosine", "cka": "1 - CKA"}
TAPS = {"fpn": "FPN", "backbone": "backbone stages"}
_COLORS = {"identical": "#0072B2", "inner": "#D55E00", "cross": "#000000", "teacher": "#009E73"}
_LINES = {"identical": "-", "inner": "--", "cross": "-.", "teacher": ":"}
_DPI = 110


def draw_heat_maps(record: Mapping[str, Any], tap: str, path: Optional[str] = None) -> Figure:
    """A row per measure; the teacher's own levels, then for the first and the last checkpoint
    student-teacher and student-student.  A row has one scale of colours.

    Args:
        record: as the module describes it.
        tap: one of those that were measured: "fpn" or "backbone".
        path: the picture to write, in the format of its ending; None: none is written.
    """
    steps = first_and_last(record)
    shown = [("teacher - teacher", steps[0], "teacher-teacher")]
    for step in steps:
        for kind in ("student-teacher", "student-student"):
            shown.append((f"{kind.replace('-', ' - ')}\n{step['name']}", step, kind))
    figure = Figure(figsize=(2.7 * len(shown), 2.7 * len(MEASURES)), layout="constrained")
    grid = figure.subplots(len(MEASURES), len(shown), squeeze=False)
    for row, measure in zip(grid, MEASURES):
        matrices = [step["taps"][tap]["matrices"][kind][measure] for _, step, kind in shown]
        known = np.concatenate([np.ravel(np.array(m["mean"], float)) for m in matrices])
        low, high = np.nanmin(known), np.nanmax(known)
        for axes, (title, _, kind), matrix in zip(row, shown, matrices):
            picture = _heat_map(axes, matrix, low, high)
            axes.set_title(title if measure == MEASURES[0] else "", fontsize="medium")
            axes.set_ylabel(f"{kind.split('-')[0]}'s stride", fontsize="small")
            axes.set_xlabel(f"{kind.split('-')[1]}'s stride", fontsize="small")
        figure.colorbar(picture, ax=list(row), label=NAMES[measure], shrink=0.9)
    if path:
        figure.savefig(path, dpi=_DPI)
    return figure


def _heat_map(axes: Axes, matrix: Mapping[str, Any], low: float, high: float) -> AxesImage:
    mean, sd = np.array(matrix["mean"], float), np.array(matrix["sd"], float)
    picture = axes.imshow(mean, cmap="cividis", vmin=low, vmax=high)
    for (i, j), value in np.ndenumerate(mean):
        if np.isnan(value):
            continue
        dark = value < (low + high) / 2
        spread = f"\n±{sd[i, j]:.2f}" if np.isfinite(sd[i, j]) else ""
        color = "white" if dark else "black"
        axes.text(j, i, f"{value:.2f}{spread}", ha="center", va="center", color=color, fontsize=7)
    axes.set_xticks(range(len(matrix["columns"])), matrix["columns"], fontsize="small")
    axes.set_yticks(range(len(matrix["rows"])), matrix["rows"], fontsize="small")
    return picture


def draw_training(
    record: Mapping[str, Any], tap: str, path: Optional[str] = None
) -> Optional[Figure]:
    """The quantities over training with their 95 % intervals over images; a panel per measure.

    Args:
        record, tap, path: as in :func:`draw_heat_maps`.

    Returns:
        the figure; None with fewer than two checkpoints of known iteration.
    """
    steps = [step for step in record["checkpoints"] if step["iteration"] is not None]
    if len(steps) < 2:
        return None
    figure = Figure(figsize=(14, 4), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES):
        x = [step["iteration"] for step in steps]
        for name in QUANTITIES:
            points = [step["taps"][tap]["quantities"][measure][name] for step in steps]
            mean, half = (np.array([p[k] for p in points], float) for k in ("mean", "half_width"))
            line = dict(color=_COLORS[name], linestyle=_LINES[name], marker=".", label=name)
            axes.plot(x, mean, **line)
            axes.fill_between(x, mean - half, mean + half, color=_COLORS[name], alpha=0.15, lw=0)
        axes.set(xlabel="iteration", title=f"{TAPS[tap]}: {GAPS[measure]}")
        # Intervals of few minibatches may be far wider than the range of the gaps.
        axes.set_ylim(0, 1.2 * max(np.nanmax(line.get_ydata()) for line in axes.lines))
        axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    if path:
        figure.savefig(path, dpi=_DPI)
    return figure


def first_and_last(record: Mapping[str, Any]) -> List[Mapping[str, Any]]:
    steps = record["checkpoints"]
    return [steps[0], steps[-1]] if len(steps) > 1 else [steps[0]]


def words(record: Mapping[str, Any]) -> str:
    """features.md from ``record``: the verdict, the numbers, what changed, how it was measured."""
    taps = list(record["checkpoints"][0]["taps"])
    parts = ["# Feature gaps", _verdict(record, taps), _initial(record)]
    parts += ["## The gaps", _gap_table(record, taps)]
    parts.append("\n".join(f"- *{name}*: {what}" for name, what in QUANTITIES.items()))
    if record["change"]:
        first, last = first_and_last(record)
        parts += [f"## Change from {first['name']} to {last['name']}", _change_table(record, taps)]
    parts += ["## Pictures"] + [f"![{name}]({name})" for name in record["pictures"]]
    parts += ["## How it was measured", _method(record)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _verdict(record: Mapping[str, Any], taps: List[str]) -> str:
    steps = first_and_last(record)
    when = [f"before training ({steps[0]['name']})", f"after training ({steps[-1]['name']})"]
    answers = [f"{at}: {_count(step, taps)}" for at, step in zip(when, steps)]
    lead = "; ".join(reversed(answers))
    lines = [
        "Are the student's inner cross-layer gaps smaller than its cross-layer gaps to the teacher? "
        f"{lead[0].upper()}{lead[1:]}.",
        "",
    ]
    for step in steps:
        for tap in taps:
            for measure in MEASURES:
                lines.append(
                    f"- {step['name']}, {TAPS[tap]}, {GAPS[measure]}: "
                    + _sentence(step, tap, measure)
                )
    return "\n".join(lines)


def _initial(record: Mapping[str, Any]) -> str:
    """Whether "before training" is what it was for the run."""
    return {
        True: "The initial weights are those that the run started from.",
        False: "**The initial weights are others than those that the run started from**, drawn in "
        "the same way: config.yaml lists the parts of a model in another order than the config that "
        "the run was started with, or the seed or the software differ.",
        None: "",
    }[record["initial_is_the_runs"]]


def _count(step: Mapping[str, Any], taps: List[str]) -> str:
    found = [step["taps"][t]["inner_minus_cross"][m]["verdict"] for t in taps for m in MEASURES]
    text = f"**yes** in {found.count('smaller')} of {len(found)} measures"
    if "larger" in found:
        text += f", **no** in {found.count('larger')}"
    return text


def _sentence(step: Mapping[str, Any], tap: str, measure: str) -> str:
    """One verdict; it claims nothing where the interval includes zero."""
    found = step["taps"][tap]
    inner, cross = (found["quantities"][measure][q]["mean"] for q in ("inner", "cross"))
    difference = found["inner_minus_cross"][measure]
    over = "minibatches" if measure == "cka" else "images"
    answer = {
        "smaller": "**yes**, the inner gaps are smaller",
        "larger": "**no**, the inner gaps are larger",
        "no difference shown": "**not shown** either way, the interval includes zero",
        "too few for an interval": "**not known**, there are too few for an interval",
    }[difference["verdict"]]
    pairs = difference["pairs"].values()
    smaller = sum(pair["verdict"] == "smaller" for pair in pairs)
    larger = sum(pair["verdict"] == "larger" for pair in pairs)
    return (
        f"{answer}: {_number(inner)} against {_number(cross)}, difference {_interval(difference)} over "
        f"{difference['count']} {over}; of {len(pairs)} level pairs {smaller} smaller, {larger} larger"
        + _carried(difference)
    )


def _carried(difference: Mapping[str, Any]) -> str:
    """The level pairs that make the mean what it is, where most say the opposite."""
    pairs, opposite = difference["pairs"], {"smaller": "larger", "larger": "smaller"}
    against = [x for x in pairs.values() if x["verdict"] == opposite.get(difference["verdict"])]
    if 2 * len(against) <= len(pairs):
        return ""
    sign = np.sign(difference["mean"])
    few = sorted(
        (n for n in pairs if sign * pairs[n]["mean"] > 0), key=lambda n: -sign * pairs[n]["mean"]
    )
    return f"; the mean is carried by the strides {', '.join(few)}"


def _gap_table(record: Mapping[str, Any], taps: List[str]) -> str:
    rows = []
    for tap in taps:
        for measure in MEASURES:
            for step in record["checkpoints"]:
                values = step["taps"][tap]["quantities"][measure]
                cells = [
                    f"{_number(v['mean'])} ± {_number(v['half_width'])}" for v in values.values()
                ]
                rows.append([TAPS[tap], GAPS[measure], step["name"], *cells])
    return _table(rows, ["maps", "gap", "student", *QUANTITIES])


def _change_table(record: Mapping[str, Any], taps: List[str]) -> str:
    rows = []
    for tap in taps:
        for measure in MEASURES:
            changes = record["change"][tap][measure]
            cells = [f"{_interval(x)} {x['verdict']}" for x in changes.values()]
            rows.append([TAPS[tap], GAPS[measure], *cells])
    return _table(rows, ["maps", "gap", *record["change"][taps[0]][MEASURES[0]]])


def _method(record: Mapping[str, Any]) -> str:
    widths = "; ".join(
        f"{TAPS[tap]}: "
        + ", ".join(
            f"{who} " + "/".join(map(str, channels.values())) for who, channels in sides.items()
        )
        for tap, sides in record["channels"].items()
    )
    lines = [
        f"{record['images']} validation images, one at a time, both detectors in float32 and in "
        "evaluation mode; padding is left out.",
        f"MSE with normalize={record['normalize']} and cosine: the larger map is average-pooled to "
        "the smaller's size and the wider one cropped to the narrower's first channels, as in the "
        "losses. CKA: all channels of both, unbiased estimate over minibatches of "
        f"{record['minibatch']} images with up to {record['positions']} positions each.",
        f"Channels: {widths}.",
        "± and brackets are 95 % t intervals over images (CKA: over minibatches). They say nothing "
        "about other seeds, other data or other training lengths. Twelve comparisons of which none "
        "is real would show one in about every second report.",
        f"`{record['command']}`",
    ]
    return "\n\n".join(line for line in lines if line)


def _number(value: Optional[float]) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.3f}"


def _interval(x: Mapping[str, Any]) -> str:
    if not x["count"]:
        return "-"
    between = f" [{x['low']:+.3f}, {x['high']:+.3f}]" if x["count"] > 1 else ""
    return f"{x['mean']:+.3f}{between}"


def _table(rows: List[List[str]], headers: List[str]) -> str:
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
