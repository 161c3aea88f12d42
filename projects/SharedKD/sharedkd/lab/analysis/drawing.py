"""Objects drawn over images by Detectron2's Visualizer: one colour per class, mistakes marked."""

import colorsys
import itertools
from dataclasses import dataclass
from typing import Any, Optional, Sequence, Tuple

import numpy as np
from detectron2.utils.visualizer import GenericMask, Visualizer
from matplotlib.figure import Figure
from matplotlib.patches import Patch

__all__ = ["FALSE_ALARM", "MISSED", "DrawnObject", "class_color", "draw_objects", "picture_grid"]

FALSE_ALARM, MISSED = "false alarm", "missed"

_CELL = 3.6  # inches, the width of one picture of a grid
_DRAWN_WIDTH = 640  # pixels, at least: lines and letters drawn on a tiny image would be blocks
_LABEL = 0.022  # points of a label's font per pixel of the image's width


@dataclass
class DrawnObject:
    """One object of a picture.

    Args:
        box: (x0, y0, x1, y1) in pixels of the image.
        category: which sets its colour.
        mask: polygons, RLE or a (H, W) array; None: the box alone.
        label: text at the box's corner.
        mark: FALSE_ALARM: dashed and crossed out; MISSED: dashes of black and white.
    """

    box: Sequence[float]
    category: int
    mask: Optional[Any] = None
    label: str = ""
    mark: str = ""


def draw_objects(image: np.ndarray, objects: Sequence[DrawnObject]) -> np.ndarray:
    """``image`` (H, W, 3) of RGB bytes, enlarged if it is small, with ``objects`` drawn over it."""
    height, width = image.shape[:2]
    visualizer = Visualizer(image, scale=max(1.0, _DRAWN_WIDTH / width))
    for each in objects:
        if each.mask is not None and each.mark != MISSED:
            # By pixels: overlay_instances fills the holes of a mask.
            pixels = GenericMask(each.mask, height, width).mask
            visualizer.draw_binary_mask(pixels, color=class_color(each.category), alpha=0.4)
    for each in objects:
        _draw_box(visualizer, each)
    font = _LABEL * width  # Visualizer sizes its labels for a picture that fills the screen
    for each in objects:
        x0, y0, x1, _ = each.box
        at_the_right = x0 > width / 2  # there the label could leave the picture
        visualizer.draw_text(
            each.label,
            (min(x1, width) if at_the_right else max(x0, 0), min(max(y0, 0), height - 2 * font)),
            font_size=font,
            color=class_color(each.category, lightness=0.8),
            horizontal_alignment="right" if at_the_right else "left",
        )
    return visualizer.output.get_image()


def _draw_box(visualizer: Visualizer, each: DrawnObject) -> None:
    if each.mark == MISSED:  # two lines, so that it shows on any image
        visualizer.draw_box(each.box, alpha=1, edge_color="black")
        visualizer.draw_box(each.box, alpha=1, edge_color="white", line_style="--")
        return
    color = class_color(each.category)
    is_wrong = each.mark == FALSE_ALARM
    visualizer.draw_box(each.box, alpha=1, edge_color=color, line_style="--" if is_wrong else "-")
    if is_wrong:
        x0, y0, x1, y1 = each.box
        for ends in ((y0, y1), (y1, y0)):
            visualizer.draw_line((x0, x1), ends, color=color, linewidth=1)


def class_color(category: int, lightness: float = 0.5) -> Tuple[float, float, float]:
    """The RGB colour of the class ``category``: ``lightness`` 0 is black, 1 is white.

    Golden-ratio steps keep the hues of neighbours far apart.
    """
    return colorsys.hls_to_rgb(category * 0.618034 % 1, lightness, 0.9)


def picture_grid(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    path: str,
    captions: Sequence[str] = (),
    classes: Sequence[Tuple[str, int]] = (),
) -> Figure:
    """Write pictures side by side, one row per image, and return the figure.

    Args:
        rows: (H, W, 3) of RGB bytes each.
        titles: of the columns.
        path: the file to write.
        captions: left of the rows.
        classes: (name, category) for a legend of the colours.
    """
    heights = [_CELL * row[0].shape[0] / row[0].shape[1] for row in rows]
    figure = Figure(figsize=(_CELL * len(titles), sum(heights) + 0.4), layout="constrained")
    cells = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=heights)
    for axes, picture in zip(cells.flat, itertools.chain(*rows)):
        axes.imshow(picture)
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes, title in zip(cells[0], titles):
        axes.set_title(title)
    for axes, caption in zip(cells[:, 0], captions):
        axes.set_ylabel(caption, fontsize="small")
    if classes:
        patches = [Patch(color=class_color(category), label=name) for name, category in classes]
        figure.legend(handles=patches, loc="outside lower center", ncols=8, fontsize="small")
    figure.savefig(path, dpi=120)
    return figure
