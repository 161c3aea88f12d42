"""Numbers and tables as the Markdown of a report has them."""

from typing import Sequence

from tabulate import tabulate

from sharedkd.lab.scores import Difference, is_known

__all__ = ["number", "table", "with_bounds", "with_half_width"]


def table(rows: Sequence[Sequence[str]], headers: Sequence[str], left: Sequence[str] = ()) -> str:
    """A table in Markdown of cells that are texts already; the columns ``left`` are flush left."""
    # The cells are formatted already: tabulate must not parse them back into numbers.
    return tabulate(
        rows,
        headers,
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["left" if header in left else "right" for header in headers],
    )


def number(value: float, layout: str = ".2f") -> str:
    """``value`` in that layout; a dash if it is not known."""
    return format(value, layout) if is_known(value) else "-"


def with_half_width(mean: float, half_width: float) -> str:
    """A mean with the half width of its interval, if it has one."""
    return number(mean) + (f" ± {half_width:.2f}" if is_known(half_width) else "")


def with_bounds(gain: Difference) -> str:
    """A mean difference with the bounds of its interval, if it has one."""
    bounds = f" [{gain.low:+.2f}, {gain.high:+.2f}]" if is_known(gain.half_width) else ""
    return number(gain.mean, "+.2f") + bounds
