"""Plots as plain SVG, coloured by style.css: small enough to look right on a phone."""

import math
from dataclasses import dataclass
from typing import List, Mapping, Optional, Sequence, Tuple

from .markup import Markup, tag

__all__ = ["COLORS", "Axis", "Band", "Mark", "legend", "line_plot", "mark_plot", "stacked_bar"]

COLORS = 8  # that style.css has; with more series, lines are dashed
WIDTH, HEIGHT = 480, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 12, 40
_MOST = 240  # points of a curve
_LOG = 30  # ratio of the greatest to the least value from which an axis is logarithmic
_LETTER = 9.0  # pixels, the width of a letter of a name on a phone, about

Point = Tuple[float, float]


@dataclass
class Band:
    """A stage's schedule: from ``start``, at its full weight from ``full``, to ``end``; iterations."""

    start: float
    full: float
    end: float


@dataclass
class Mark:
    """A point with its interval.

    Args:
        name: written beside it.
        x, y: in the units of the axes.
        half_width: of the interval of ``y``; NaN: none.
        color: the number of its colour, from 0; after :data:`COLORS` they begin again.
    """

    name: str
    x: float
    y: float
    half_width: float
    color: int


class Axis:
    """Values to pixels.

    Args:
        low, high: the values at its ends.
        start, end: their pixels.
        log: logarithmic.
    """

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 1, high + 1)
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    @property
    def ticks(self) -> List[float]:
        """Round numbers between the ends."""
        if self.log:
            return self._log_ticks()
        raw = (self.high - self.low) / 5
        step = 10 ** math.floor(math.log10(raw))
        step *= next(k for k in (1, 2, 2.5, 5, 10) if k * step >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]

    def _log_ticks(self) -> List[float]:
        first, last = (math.floor(math.log10(x)) for x in (self.low, self.high))
        for digits in ((1,), (1, 3), (1, 2, 5)):
            exponents = range(first, last + 1)
            every = max(1, len(exponents) // 6) if digits == (1,) else 1
            found = [
                d * 10.0**e
                for e in exponents
                for d in digits
                if self.low <= d * 10.0**e <= self.high and e % every == 0
            ]
            if len(found) >= 3:
                break
        return found


def line_plot(
    label: str,
    series: Mapping[str, Sequence[Point]],
    bands: Sequence[Band] = (),
    x_end: Optional[float] = None,
    y_label: str = "",
    y_from_zero: bool = False,
) -> Markup:
    """Curves over iterations.

    Args:
        label: what it shows, for those who cannot see it.
        series: name to points, x rising.
        bands: schedules to shade.
        x_end: the last iteration that belongs on the axis.
        y_label: what the curves are, with the unit.
        y_from_zero: the axis begins at zero.

    Returns:
        the plot and its legend; empty if there is nothing to draw.
    """
    series = {name: _thin([p for p in points if _finite(p)]) for name, points in series.items()}
    points = [p for each in series.values() for p in each]
    if not points:
        return Markup("")
    ys = [y for _, y in points]
    log = not y_from_zero and min(ys) > 0 and max(ys) > _LOG * min(ys)
    x = Axis(0, max([x_end or 0, *(p[0] for p in points)]), _LEFT, WIDTH - _RIGHT)
    low, high = (0, max(ys) * 1.05) if y_from_zero else _padded(ys, log)
    y = Axis(low, high, HEIGHT - _BOTTOM, _TOP, log)
    parts = [_band(x, band) for band in bands]
    parts += _frame(x, y, "iteration", y_label)
    for i, (name, each) in enumerate(series.items()):
        path = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in each)
        title = tag("title", name)
        if len(each) == 1:
            (a, b), dot = each[0], {"class_": f"dot c{i % COLORS}", "data_series": i}
            parts.append(tag("g", title, tag("circle", cx=_px(x(a)), cy=_px(y(b)), r=3.5), **dot))
        elif each:
            drawn = tag("path", d=path)
            parts.append(tag("g", title, drawn, class_=_line_class(i), data_series=i))
    return tag("div", _svg(label, parts), legend(series, toggles=True), class_="plot")


def mark_plot(
    label: str, marks: Sequence[Mark], x_label: str, y_label: str, level: Optional[float] = None
) -> Markup:
    """Points with intervals and their names.

    Args:
        label: what it shows, for those who cannot see it.
        marks: at least one.
        x_label, y_label: what the axes are, with the unit.
        level: the y of a dashed line across; None: no line.
    """
    reach = [m.half_width if math.isfinite(m.half_width) else 0 for m in marks]
    ys = [y for m, r in zip(marks, reach) for y in (m.y - r, m.y + r)]
    ys += [] if level is None else [level]
    left, right = _padded([m.x for m in marks], False, 0.12)
    x = Axis(max(0, left), right, _LEFT, WIDTH - _RIGHT)
    y = Axis(*_padded(ys, False), HEIGHT - _BOTTOM, _TOP)
    parts = _frame(x, y, x_label, y_label)
    if level is not None:
        at = _px(y(level))
        parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at, class_="level"))
    taken = [(x(m.x) - 7, y(m.y) - 7, x(m.x) + 7, y(m.y) + 7) for m in marks]
    taken += [(x(m.x) - 2, y(m.y + r), x(m.x) + 2, y(m.y - r)) for m, r in zip(marks, reach)]
    for mark, r in zip(marks, reach):
        cx, cy = x(mark.x), y(mark.y)
        title = tag("title", f"{mark.name}: {mark.y:.2f}" + (f" ± {r:.2f}" if r else ""))
        bar = _interval_bar(cx, y(mark.y - r), y(mark.y + r)) if r else ""
        at_x, at_y, box = _free_place(cx, cy, len(mark.name) * _LETTER, taken)
        taken.append(box)
        away = abs(at_y - 4 - cy) > 16
        pointer = (
            tag("line", x1=_px(cx), y1=_px(cy), x2=_px(at_x), y2=_px(at_y - 4), class_="pointer")
            if away
            else ""
        )
        name = tag("text", mark.name, x=_px(at_x), y=_px(at_y), text_anchor="middle", class_="name")
        dot = tag("circle", cx=_px(cx), cy=_px(cy), r=4.5)
        parts.append(
            tag("g", title, bar, pointer, dot, name, class_=f"mark c{mark.color % COLORS}")
        )
    return tag("div", _svg(label, parts), class_="plot")


def stacked_bar(label: str, shares: Mapping[str, float]) -> Markup:
    """Shares of a whole as one bar, with a legend that has the numbers.

    Args:
        label: what it shows, for those who cannot see it.
        shares: name -> fraction of 1.
    """
    total = sum(shares.values())
    at, parts = 0.0, []
    for i, (name, share) in enumerate(shares.items()):
        width = WIDTH * share / total if total else 0
        title = tag("title", f"{name}: {share:.1%}")
        rect = tag("rect", x=_px(at), y=0, width=_px(width), height=26)
        parts.append(tag("g", title, rect, class_=_fill_class(i), data_share=share))
        at += width
    names = {f"{name} {share:.1%}": () for name, share in shares.items()}
    return tag("div", _svg(label, parts, 26), legend(names, lines=False), class_="plot bar")


def legend(names: Mapping[str, object], toggles: bool = False, lines: bool = True) -> Markup:
    """Names with their colours.

    Args:
        names: the keys count, in the order of the colours; the values do not.
        toggles: each name is a button that shows and hides its curve.
        lines: the colours are those of curves; False: of filled shapes.
    """
    items = []
    for i, name in enumerate(names):
        kind = _line_class(i) if lines else _fill_class(i)
        shape = (
            tag("line", x1=0, x2=22, y1=6, y2=6) if lines else tag("rect", width=14, height=12, x=4)
        )
        swatch = tag(
            "svg",
            tag("g", shape, class_=kind),
            viewBox="0 0 22 12",
            class_="swatch",
            aria_hidden="true",
        )
        if toggles:
            item = tag("button", swatch, name, type="button", data_toggle=i, aria_pressed="true")
        else:
            item = tag("span", swatch, name)
        items.append(tag("li", item))
    return tag("ul", *items, class_="legend")


def _svg(label: str, parts: Sequence[Markup], height: int = HEIGHT) -> Markup:
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label)


def _frame(x: Axis, y: Axis, x_label: str, y_label: str) -> List[Markup]:
    bottom, parts = HEIGHT - _BOTTOM, []
    for value in y.ticks:
        at = _px(y(value))
        parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(
            tag("text", _short(value), x=_LEFT - 6, y=_px(y(value) + 4), text_anchor="end")
        )
    for value in x.ticks:
        text = tag("text", _short(value), x=_px(x(value)), y=bottom + 17, text_anchor="middle")
        parts.append(tag("g", text, class_="x-tick", data_value=f"{value:g}"))
    parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=bottom, y2=bottom, class_="axis"))
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(tag("text", x_label, x=middle, y=HEIGHT - 6, text_anchor="middle"))
    turned = dict(transform=f"rotate(-90 12 {bottom / 2:g})", text_anchor="middle")
    parts.append(tag("text", y_label, x=12, y=_px(bottom / 2), **turned))
    return parts


def _band(x: Axis, band: Band) -> Markup:
    """As high as its weight: the full height where the stage has its full weight."""
    bottom = HEIGHT - _BOTTOM
    corners = [(band.start, bottom), (band.full, _TOP), (band.end, _TOP), (band.end, bottom)]
    points = " ".join(f"{x(at):.1f},{height}" for at, height in corners)
    title = f"on from iteration {band.start:g} to {band.end:g}"
    title += f", full weight from {band.full:g}" if band.full > band.start else ""
    shape = tag("polygon", points=points)
    data = dict(data_start=f"{band.start:g}", data_full=f"{band.full:g}", data_end=f"{band.end:g}")
    return tag("g", tag("title", title), shape, class_="band", **data)


def _interval_bar(x: float, low: float, high: float) -> Markup:
    d = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
    return tag("path", d=d)


def _free_place(
    x: float, y: float, width: float, taken: Sequence[Tuple[float, float, float, float]]
) -> Tuple[float, float, Tuple[float, float, float, float]]:
    """Middle and base line of a name near a mark where it covers least, and its rectangle."""
    best: List[Tuple[float, float, float, Tuple[float, float, float, float]]] = []
    for rise in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6):
        for side in (1, -1, 0) if rise == 0 else (0, 1, -1):
            middle = x + side * (width / 2 + 9)
            base = y + 4 - 15 * rise
            box = (middle - width / 2, base - 11, middle + width / 2, base + 3)
            cost = sum(_overlap(box, other) for other in taken)
            inside = (_LEFT, _TOP - 4, WIDTH, HEIGHT - _BOTTOM)
            cost += width * 14 - _overlap(box, inside)
            best.append((round(cost), middle, base, box))
    _, middle, base, box = min(best, key=lambda found: found[0])  # of equals the nearest
    return middle, base, box


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _thin(points: Sequence[Point]) -> List[Point]:
    """At most :data:`_MOST` points, each the mean of its neighbours."""
    size = math.ceil(len(points) / _MOST)
    if size < 2:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(a) / len(a), sum(b) / len(b)) for a, b in (zip(*group) for group in groups)]


def _padded(values: Sequence[float], log: bool, share: float = 0.06) -> Tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        factor = (high / low) ** share
        return low / factor, high * factor
    margin = (high - low) * share or abs(high) * share or 1
    return low - margin, high + margin


def _line_class(i: int) -> str:
    return f"curve c{i % COLORS}" + (f" d{i // COLORS % 3}" if i >= COLORS else "")


def _fill_class(i: int) -> str:
    return f"fill c{i % COLORS}" + (f" faint{i // COLORS % 3}" if i >= COLORS else "")


def _finite(point: Point) -> bool:
    return all(math.isfinite(x) for x in point)


def _px(value: float) -> str:
    return f"{value:.1f}"


def _short(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{round(value, 10):g}"
