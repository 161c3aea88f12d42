"""Writes features.json as text.

All functions read that record, a plain dict:

* "images", "minibatch", "positions", "normalize": how it was measured, see :mod:`.gaps`;
* "checkpoints": one mapping per state of the student, in the order of training, with "name", "file",
  "iteration" (None if unknown) and "taps": tap -> :meth:`Gaps.record() <.gaps.Gaps.record>`;
* "initial_is_the_runs", "channels" (tap -> who -> stride -> channels), "pictures", "command".
"""

from typing import Any, List, Mapping

from sharedkd.lab.tables import bounded, markdown, number

from .gaps import QUANTITIES
from .similarity import MEASURES

__all__ = ["GAPS", "NAMES", "TAPS", "first_and_last", "words"]

NAMES = {"mse": "MSE", "cosine": "cosine", "cka": "linear CKA"}
GAPS = {"mse": "MSE", "cosine": "1 - cosine", "cka": "1 - CKA"}
TAPS = {"fpn": "FPN", "backbone": "backbone stages"}
_INITIAL = {
    True: "The initial weights are those that the run started from.",
    False: "**The initial weights differ from those that the run started from**; they are drawn in "
    "the same way: config.yaml lists the parts of a model in another order than the config that "
    "the run was started with, or the seed or the software differ.",
    None: "",
}


def first_and_last(record: Mapping[str, Any]) -> List[Mapping[str, Any]]:
    """The first and the last of the checkpoints; one, if there are no more."""
    steps = record["checkpoints"]
    return [steps[0], steps[-1]] if len(steps) > 1 else [steps[0]]


def words(record: Mapping[str, Any]) -> str:
    """features.md from ``record``: the verdict, the numbers, how it was measured."""
    parts = [
        "# Feature gaps",
        _verdict(record),
        _INITIAL[record["initial_is_the_runs"]],
        "## The gaps",
        _table(record),
        "\n".join(f"- *{name}*: {what}" for name, what in QUANTITIES.items()),
        "*inner - cross* is paired image by image (of CKA minibatch by minibatch); where its interval "
        "includes zero, nothing is claimed. features.json has it for each pair of levels.",
        "## Pictures",
        *(f"![{name}]({name})" for name in record["pictures"]),
        "## How it was measured",
        *_method(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _verdict(record: Mapping[str, Any]) -> str:
    lead = (
        "Are the student's inner cross-layer gaps smaller than its cross-layer gaps to the teacher?"
    )
    lines = []
    for when, step in zip(("Before", "After"), first_and_last(record)):
        found = [
            tap["inner_minus_cross"][measure]["verdict"]
            for tap in step["taps"].values()
            for measure in MEASURES
        ]
        text = (
            f"{when} training ({step['name']}): **yes** in {found.count('smaller')} of {len(found)}"
        )
        larger = f", **no** in {found.count('larger')}" if "larger" in found else ""
        lines.append(f"{text} measures{larger}.")
    return " ".join([lead, *reversed(lines)])


def _table(record: Mapping[str, Any]) -> str:
    rows = []
    for tap in record["checkpoints"][0]["taps"]:
        for measure in MEASURES:
            for step in record["checkpoints"]:
                found = step["taps"][tap]
                apart = found["inner_minus_cross"][measure]
                means = [
                    f"{number(x['mean'], '.3f')} ± {number(x['half_width'], '.3f')}"
                    for x in found["quantities"][measure].values()
                ]
                row = [TAPS[tap], GAPS[measure], step["name"], *means]
                interval = bounded(apart["mean"], apart["low"], apart["high"], "+.3f")
                rows.append([*row, interval, apart["verdict"]])
    head = ["maps", "gap", "student", *QUANTITIES, "inner - cross", "verdict"]
    return markdown(rows, head)


def _method(record: Mapping[str, Any]) -> List[str]:
    widths = "; ".join(
        f"{TAPS[tap]}: "
        + ", ".join(f"{who} {'/'.join(map(str, x.values()))}" for who, x in sides.items())
        for tap, sides in record["channels"].items()
    )
    return [
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
