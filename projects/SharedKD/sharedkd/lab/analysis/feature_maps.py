"""Where in an image student and teacher differ: their maps and the difference, level by level."""

from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import numpy as np
from detectron2.data.detection_utils import read_image
from matplotlib.figure import Figure
from torch import Tensor

from sharedkd.losses.alignment import align
from sharedkd.losses.base import Batch, precise
from sharedkd.losses.distance import DISTANCES, NORMALIZATIONS

__all__ = ["draw_maps", "position_maps"]

_CELL = 2.3  # inches
PositionMaps = Dict[int, Dict[str, np.ndarray]]


def position_maps(
    student: Mapping[int, Tensor],
    teacher: Mapping[int, Tensor],
    image_size: Tuple[int, int],
    normalize: str,
) -> PositionMaps:
    """What is drawn of one image.

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
    record: Mapping[str, Any],
    image_size: Tuple[int, int],
    steps: Sequence[Tuple[str, PositionMaps]],
    path: Optional[str] = None,
) -> Figure:
    """One row per level over the grey image: the teacher's map, then the student's, and the difference
    of both, at each step.

    Colours of activations are scaled by each map's own largest value; those of a level's differences
    by one scale, so that they can be compared between steps.

    Args:
        record: of the dataset, with "file_name".
        image_size: of the mapped image.
        steps: (title, what :func:`position_maps` returned) of at least one checkpoint.
        path: the file to write.
    """
    image = read_image(record["file_name"], format="L").squeeze()
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
            axes.imshow(image, cmap="gray", extent=(0, image_size[1], image_size[0], 0))
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
        figure.savefig(path, dpi=110)
    return figure
