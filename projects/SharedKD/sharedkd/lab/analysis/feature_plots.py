"""Pictures of feature gaps: heat maps, curves over training, and maps laid over an image.

A record is what features.json holds, see :mod:`.gap_report`.
"""

from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from sharedkd.losses.alignment import align
from sharedkd.losses.base import Batch, precise
from sharedkd.losses.distance import DISTANCES, NORMALIZATIONS

from .gap_report import GAPS, NAMES, TAPS, first_and_last
from .gaps import QUANTITIES
from .similarity import MEASURES

__all__ = ["draw_heat_maps", "draw_maps", "draw_training", "position_maps"]

_COLORS = {"identical": "#0072B2", "inner": "#D55E00", "cross": "#000000", "teacher": "#009E73"}
_LINES = {"identical": "-", "inner": "--", "cross": "-.", "teacher": ":"}
_DPI = 110
_CELL = 2.3  # inches
PositionMaps = Dict[int, Dict[str, np.ndarray]]


def draw_heat_maps(record: Mapping[str, Any], tap: str, path: Optional[str] = None) -> Figure:
    """Draw the gaps of all level pairs, a row per measure with one scale of colours.

    The columns are teacher-teacher, then student-teacher and student-student of the first and of the
    last checkpoint.

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
    """Draw the quantities over training with 95 % intervals over images, a panel per measure.

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


def draw_maps(
    image: Tensor,
    steps: Sequence[Tuple[str, PositionMaps]],
    path: Optional[str] = None,
) -> Figure:
    """Draw maps over the grey image, one row per level.

    The columns are the teacher's map, then at each step the student's map and the difference of both.
    Colours of activations are scaled by each map's own largest value; those of a level's differences
    by one scale, so that they can be compared between steps.

    Args:
        image: (C, H, W), as the models get it.
        steps: (title, what :func:`position_maps` returned) of at least one checkpoint.
        path: the file to write.
    """
    image_size = image.shape[-2:]
    strides = list(steps[0][1])
    titles = ["teacher"] + [
        f"{what}{title}" for title, _ in steps for what in ("student, ", "difference, ")
    ]
    ratio = image_size[0] / image_size[1]
    figure = Figure(
        figsize=(_CELL * len(titles), _CELL * ratio * len(strides) + 0.5), layout="constrained"
    )
    grid = figure.subplots(len(strides), len(titles), squeeze=False)
    for row, stride in zip(grid, strides):
        shown = [steps[0][1][stride]["teacher"]]
        for _, maps in steps:
            shown += [maps[stride]["student"], maps[stride]["difference"]]
        most = max(maps[stride]["difference"].max() for _, maps in steps)
        for axes, title, x in zip(row, titles, shown):
            is_difference = title.startswith("difference")
            whole = (0, image_size[1], image_size[0], 0)
            axes.imshow(image.float().mean(0), cmap="gray", vmin=0, vmax=255, extent=whole)
            # A map's position covers stride x stride pixels; the last ones may stick out.
            extent = (0, x.shape[1] * stride, x.shape[0] * stride, 0)
            axes.imshow(
                x,
                cmap="magma" if is_difference else "viridis",
                vmin=0,
                vmax=(most if is_difference else x.max()) or 1,
                alpha=0.6,
                extent=extent,
                interpolation="nearest",
            )
            axes.set(xlim=(0, image_size[1]), ylim=(image_size[0], 0), xticks=[], yticks=[])
            if stride == strides[0]:
                axes.set_title(title, fontsize="small")
        row[0].set_ylabel(f"stride {stride}", fontsize="small")
    if path:
        figure.savefig(path, dpi=_DPI)
    return figure
