"""Matplotlib's figures as SVG in the colours of the page, so that they can be read on light and dark."""

import math
import re
from dataclasses import dataclass
from io import BytesIO
from typing import Callable, List, Mapping, Optional, Sequence, Tuple

import matplotlib.style
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from sharedkd.lab.compare.plots import PALETTE

__all__ = ["DASHES", "Curve", "Plot", "as_svg", "draw_curves"]

DASHES = ("solid", "dashed", "dotted")  #: of curves; CSS has the same names
_POINTS = 240  # of a curve, at most
_LOG = 30  # ratio of the greatest to the least value from which an axis is logarithmic
_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may have two dollars
}
# style.css has a light and a dark value of each. Matplotlib leaves black fills to the page.
_VARIABLES = {color.lower(): f"var(--c{i})" for i, color in enumerate(PALETTE)}
_VARIABLES["#b0b0b0"] = "var(--line)"  # the grid

Curve = Tuple[Sequence[float], Sequence[float]]  #: iterations, rising, and values


@dataclass
class Plot:
    """A figure of the page: ``caption``, ``svg``, and the ``names`` of its curves, for the legend."""

    caption: str
    svg: Markup
    names: Sequence[str] = ()


def as_svg(draw: Callable[[], Figure], label: str) -> Markup:
    """An ``<svg>`` element, the same for the same figure.

    Lines with the gid ``series_N`` become groups with the attribute ``data-series="N"``.  ``label``
    tells those who cannot see it; each figure of a page needs its own, as ids are made from it.
    """
    file = BytesIO()
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": label}]):
        draw().savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue().decode()
    _, _, width, height = re.search(r'viewBox="([^"]*)"', text).group(1).split()
    inner = text[text.index(">", text.index("<svg")) + 1 :]
    inner = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", inner, flags=re.S)
    inner = re.sub(r' id="series_(\d+)"', r' data-series="\1"', inner)
    inner = re.sub(r' id="\w+_\d+"', "", inner)  # nothing refers to them
    inner = re.sub(r"#[0-9a-f]{6}(?=[;\"])", lambda x: _VARIABLES.get(x[0], x[0]), inner)
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" style="--width:{width}px" role="img" '
        f'aria-label="{escape(label)}">{inner}'
    )


def draw_curves(
    curves: Mapping[str, Curve],
    y_label: str,
    band: Optional[Tuple[float, float, float]] = None,
    end: Optional[int] = None,
    from_zero: bool = False,
) -> Figure:
    """Draw curves over iterations.

    Args:
        curves: by name; of a long one the means of neighbouring points are drawn.
        y_label: what the values are, with their unit.
        band: the iterations in which a stage starts, is at its full weight, and ends: shaded.
        end: the last iteration on the axis, at least.
        from_zero: the axis of the values begins at zero. Else it is logarithmic if all values are
            positive and differ by more than a factor of 30.
    """
    figure = Figure(figsize=(5.2, 3.3))
    axes = figure.add_axes((0.17, 0.16, 0.8, 0.81))  # a computed layout takes twice the time
    if band:
        corners = [*band, band[-1]], [0, 1, 1, 0]  # as high as the weight
        axes.fill(*corners, PALETTE[1], transform=axes.get_xaxis_transform(), alpha=0.12, lw=0)
    for i, curve in enumerate(curves.values()):
        x, y = _thin(*np.array(curve, float))
        color, dash = PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)]
        marker = "o" if len(x) == 1 else ""
        axes.plot(x, y, color=color, linestyle=dash, marker=marker, gid=f"series_{i}")
    xs, ys = np.concatenate([np.array(curve, float) for curve in curves.values()], axis=1)
    axes.set_xlim(0, max(end or 1, *xs))
    if from_zero:
        axes.set_ylim(0, 1.05 * max(ys) or 1)
    elif min(ys) > 0 and max(ys) > _LOG * min(ys):
        axes.set_yscale("log")
    axes.set(xlabel="iteration", ylabel=y_label)
    axes.yaxis.set_label_coords(-0.165, 0.5)
    return figure


def _thin(*values: np.ndarray) -> List[np.ndarray]:
    """At most ``_POINTS`` points, each the mean of neighbours."""
    starts = range(0, len(values[0]), math.ceil(len(values[0]) / _POINTS) or 1)
    return [np.array([x[i : i + starts.step].mean() for i in starts]) for x in values]
