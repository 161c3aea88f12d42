"""Pictures of feature gaps: heat maps, curves over training, and maps laid over an image.

A record is what features.json holds, see :mod:`.gap_report`.
"""

from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from sharedkd.lab.compare.plots import PALETTE
from sharedkd.losses.alignment import align
from sharedkd.losses.base import Batch, precise
from sharedkd.losses.distance import DISTANCES, NORMALIZATIONS

from .gap_report import GAPS, NAMES, TAPS, first_and_last
from .gaps import QUANTITIES
from .similarity import MEASURES

__all__ = ["draw_heat_maps", "draw_maps", "draw_training", "position_maps"]

_LINES = dict(zip(QUANTITIES, zip(PALETTE, ("-", "--", "-.", ":"))))
_CELL = 2.5  # inches
PositionMaps = Dict[int, Dict[str, np.ndarray]]


def draw_heat_maps(record: Mapping[str, Any], tap: str) -> Figure:
    """Draw the measures of all level pairs of a tap, a row per measure with one scale of colours.

    The columns are teacher-teacher, then student-teacher and student-student of the first and of the
    last checkpoint.
    """
    steps = first_and_last(record)
    shown = [("teacher - teacher", steps[0], "teacher-teacher")]
    for step in steps:
        for kind in ("student-teacher", "student-student"):
            shown.append((f"{kind.replace('-', ' - ')}\n{step['name']}", step, kind))
    figure = Figure(figsize=(_CELL * len(shown), _CELL * len(MEASURES)), layout="constrained")
    grid = figure.subplots(len(MEASURES), len(shown), squeeze=False)
    for row, measure in zip(grid, MEASURES):
        matrices = [step["taps"][tap]["matrices"][kind][measure] for _, step, kind in shown]
        means = [np.array(matrix["mean"], float) for matrix in matrices]
        low, high = (f(np.concatenate([x.ravel() for x in means])) for f in (np.nanmin, np.nanmax))
        for axes, (title, _, kind), matrix, mean in zip(row, shown, matrices, means):
            picture = axes.imshow(mean, cmap="cividis", vmin=low, vmax=high)
            for i, j in zip(*np.nonzero(np.isfinite(mean))):
                value, sd = mean[i, j], np.array(matrix["sd"], float)[i, j]
                text = f"{value:.2f}" + (f"\n±{sd:.2f}" if np.isfinite(sd) else "")
                color = "white" if value < (low + high) / 2 else "black"
                axes.text(j, i, text, ha="center", va="center", color=color, fontsize=7)
            axes.set_xticks(range(len(matrix["columns"])), matrix["columns"], fontsize="small")
            axes.set_yticks(range(len(matrix["rows"])), matrix["rows"], fontsize="small")
            axes.set_title(title if measure == MEASURES[0] else "", fontsize="medium")
            rows, columns = kind.split("-")
            axes.set_ylabel(f"{rows}'s stride", fontsize="small")
            axes.set_xlabel(f"{columns}'s stride", fontsize="small")
        figure.colorbar(picture, ax=list(row), label=NAMES[measure], shrink=0.9)
    return figure


def draw_training(record: Mapping[str, Any], tap: str) -> Optional[Figure]:
    """Draw the quantities over training with 95 % intervals over images, a panel per measure.

    None with fewer than two checkpoints of known iteration.
    """
    steps = [step for step in record["checkpoints"] if step["iteration"] is not None]
    if len(steps) < 2:
        return None
    x = [step["iteration"] for step in steps]
    figure = Figure(figsize=(14, 4), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES):
        for name, (color, dash) in _LINES.items():
            points = [step["taps"][tap]["quantities"][measure][name] for step in steps]
            mean, half = (np.array([p[k] for p in points], float) for k in ("mean", "half_width"))
            axes.plot(x, mean, color=color, linestyle=dash, marker=".", label=name)
            axes.fill_between(x, mean - half, mean + half, color=color, alpha=0.15, lw=0)
        axes.set(xlabel="iteration", title=f"{TAPS[tap]}: {GAPS[measure]}")
        # Intervals of few minibatches may be far wider than the range of the gaps.
        axes.set_ylim(0, 1.2 * max(np.nanmax(line.get_ydata()) for line in axes.lines))
        axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def position_maps(
    student: Mapping[int, Tensor],
    teacher: Mapping[int, Tensor],
    image_size: Tuple[int, int],
    normalize: str,
) -> PositionMaps:
    """Compute the maps to draw for one image.

    Args:
        student, teacher: stride -> (1, C, H, W).
        image_size: (height, width) in pixels, without padding.
        normalize: of the MSE, as in the pair's loss.

    Returns:
        stride -> "student" and "teacher" (the mean absolute activation over channels) and
        "difference" (the squared difference of the normalised maps, mean over the channels that both
        have; its mean over positions is the MSE), each (h, w) without padding.
    """
    batch = Batch({"": dict(student)}, None, [image_size])
    found = {}
    for stride in sorted(student.keys() & teacher.keys()):
        s, t = precise(student[stride]), precise(teacher[stride])
        mask = batch.inside(s, stride)
        mask = None if mask is None else mask.to(s.dtype)
        x, y = (NORMALIZATIONS[normalize](each, mask) for each in align(s, t))
        maps = {
            "student": s.abs().mean(1),
            "teacher": t.abs().mean(1),
            "difference": DISTANCES["mse"](x, y).mean(1),
        }
        height, width = (-(-side // stride) for side in image_size)
        found[stride] = {k: x[0, :height, :width].cpu().numpy() for k, x in maps.items()}
    return found


def draw_maps(image: Tensor, steps: Sequence[Tuple[str, PositionMaps]]) -> Figure:
    """Draw maps over the grey image, one row per level.

    The columns are the teacher's map, then at each step the student's map and the difference of both.
    Colours of activations are scaled by each map's own largest value; those of a level's differences
    by one scale, so that they can be compared between steps.

    Args:
        image: (C, H, W), as the models get it.
        steps: (title, what :func:`position_maps` returned) of at least one checkpoint.
    """
    grey, (height, width) = image.float().mean(0), image.shape[-2:]
    first = steps[0][1]
    columns = [("teacher", "teacher", first)]
    for title, maps in steps:
        columns += [(f"{kind}, {title}", kind, maps) for kind in ("student", "difference")]
    size = (_CELL * len(columns), _CELL * height / width * len(first) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    for row, stride in zip(figure.subplots(len(first), len(columns), squeeze=False), first):
        most = max(maps[stride]["difference"].max() for _, maps in steps)
        for axes, (title, kind, maps) in zip(row, columns):
            x, differs = maps[stride][kind], kind == "difference"
            axes.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
            axes.imshow(
                x,
                cmap="magma" if differs else "viridis",
                vmin=0,
                vmax=(most if differs else x.max()) or 1,
                alpha=0.6,
                # A map's position covers stride x stride pixels; the last ones may stick out.
                extent=(0, x.shape[1] * stride, x.shape[0] * stride, 0),
                interpolation="nearest",
            )
            axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
            if stride == min(first):
                axes.set_title(title, fontsize="small")
        row[0].set_ylabel(f"stride {stride}", fontsize="small")
    return figure
