"""Writes features.json as text.

All functions read that record, a plain dict:

* "images", "minibatch", "positions", "normalize": how it was measured, see :mod:`.gaps`;
* "checkpoints": one mapping per state of the student, in the order of training, with "name", "file",
  "iteration" (None if unknown) and "taps": tap -> :meth:`Gaps.record() <.gaps.Gaps.record>`;
* "change": tap -> measure -> quantity -> :func:`~.gaps.paired` of the last checkpoint and the first;
* "initial_is_the_runs", "channels" (tap -> who -> stride -> channels), "pictures", "command".
"""

from typing import Any, List, Mapping, Optional

import numpy as np
from tabulate import tabulate

from .gaps import QUANTITIES
from .similarity import MEASURES

__all__ = ["first_and_last", "words"]

NAMES = {"mse": "MSE", "cosine": "cosine", "cka": "linear CKA"}
# What the bright cells of a heat map are.
BRIGHT = {"mse": "far apart", "cosine": "alike", "cka": "alike"}
GAPS = {"mse": "MSE", "cosine": "1 - cosine", "cka": "1 - CKA"}
TAPS = {"fpn": "FPN", "backbone": "backbone stages"}


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
    """Whether the initial weights are those of the run."""
    return {
        True: "The initial weights are those that the run started from.",
        False: "**The initial weights differ from those that the run started from**; they are drawn in "
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
    )


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
        "about other seeds, other data or other training lengths. Twelve comparisons without a real "
        "difference would show one in about every second report.",
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
