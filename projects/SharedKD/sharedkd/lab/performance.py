"""Tables of what tools/benchmark.py measured: for the console, and for docs/performance.md.

A result is what ``tools/benchmark.py --json`` writes, see :func:`~sharedkd.lab.benchmark.measure`.
"""

import shlex
from itertools import groupby
from typing import Any, List, Mapping

from sharedkd.lab.schemes import PLAIN
from sharedkd.lab.tables import markdown, number

__all__ = ["page", "pairs", "rivals", "schemes", "table"]

Result = Mapping[str, Any]


def table(result: Result) -> str:
    """One row for each arm of ``result``, then its ratios."""
    rows = [
        [name, _spread(each), _memory(result, name)] for name, each in result["seconds"].items()
    ]
    lines = [f"{name}: {_spread(x)}" for name, x in result["ratios"].items()]
    return "\n".join([markdown(rows, ["arm", "seconds", "peak MB"]), "", *lines])


def pairs(results: Mapping[str, Result]) -> str:
    """One row for each pair.

    Args:
        results: name -> result.
    """
    rows = []
    for name, result in results.items():
        known = result["ratios"]
        keys = ("overhead", "added", "losses", "measuring")
        ratios = [_spread(known[key]) if key in known else "-" for key in keys]
        peaks = [_memory(result, arm) for arm in ("student_sharedkd", "distill")]
        rows.append([name, *ratios, *peaks])
    titles = ["pair", "overhead", "added / teacher's forward", "losses / step", "measuring / step"]
    return markdown(rows, [*titles, "MB, plain step", "MB, distilled step"])


def rivals(result: Result) -> str:
    """One row for Shared-KD and for each of the methods that ``result`` was measured with."""
    rows = []
    for name in ("distill", *(key.partition("/")[2] for key in _rivals(result))):
        losses = result["seconds"][f"losses/{name}"]["median"]
        share = "-" if name == "distill" else _spread(result["ratios"][f"distill/{name}"])
        label = "Shared-KD" if name == "distill" else name
        step = result["seconds"][name]["median"]
        rows.append([label, f"{step:.3f}", share, f"{losses:.3f}", _memory(result, name)])
    titles = ["method", "seconds a step", "Shared-KD's step / its step", "of it losses", "MB"]
    return markdown(rows, titles)


def schemes(result: Result) -> str:
    """What was measured on what, the command, and one row for each scheme.

    Args:
        result: of :func:`~sharedkd.lab.schemes.measure_schemes`, with its ``command``.
    """
    rows = []
    for name, seconds in result["seconds"].items():
        step = "1" if name == PLAIN else _spread(result["ratios"][name])
        more = result["memory_mb"][name] - result["memory_mb"][PLAIN]
        rows.append([name, step, f"{seconds['median']:.3f}", _memory(result, name), f"{more:+,d}"])
    titles = ["scheme", "its step / plain step", "seconds a step", "MB", "MB beside the plain step"]
    command = f"```bash\n{shlex.join(result['command'])}\n```"
    return "\n\n".join([_circumstances(result), command, markdown(rows, titles)])


def page(results: Mapping[str, Result]) -> str:
    """The tables of docs/performance.md by hardware, with the commands that measured them.

    Args:
        results: name -> result, with its ``command``.
    """
    ordered = sorted(results.items(), key=lambda each: _circumstances(each[1]))
    blocks: List[str] = []
    for circumstances, group in groupby(ordered, lambda each: _circumstances(each[1])):
        some = dict(group)
        blocks += [circumstances, pairs(some)]
        blocks += [f"`{n}`, other methods:\n\n{rivals(x)}" for n, x in some.items() if _rivals(x)]
        commands = [f"{shlex.join(result['command'])}  # {n}" for n, result in some.items()]
        blocks.append("\n".join(["```bash", *commands, "```"]))
    return "\n\n".join(blocks)


def _circumstances(result: Result) -> str:
    """Hardware, images, precision and versions of a table."""
    height, width = result["images"][0]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    return (
        f"**{result['hardware']}**: {len(result['images'])} images of {height} x {width}, step in "
        f"{result['precision']}, teacher in {result['teacher_precision']}; {versions}"
    )


def _rivals(result: Result) -> List[str]:
    return [key for key in result["ratios"] if key.startswith("distill/")]


def _memory(result: Result, arm: str) -> str:
    return number(result["memory_mb"].get(arm), ",.0f")


def _spread(x: Mapping[str, float]) -> str:
    return f"{x['median']:.3f} ({x['low']:.3f} to {x['high']:.3f})"
