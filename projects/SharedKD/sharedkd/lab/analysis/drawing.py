"""Objects drawn over images by Detectron2's Visualizer: one colour per class, mistakes marked."""

import colorsys
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from detectron2.utils.visualizer import GenericMask, Visualizer
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from sharedkd.data.images import read_image

from .detections import Found, Truth
from .mistakes import CORRECT, IGNORED, Match

__all__ = ["FALSE_ALARM", "MISSED", "DrawnObject", "class_color", "draw_gallery", "draw_objects"]

TRUTH, FALSE_ALARM, MISSED = "ground truth", "false alarm", "missed"

_FULL = 12  # objects of a picture that are few enough to be labelled
_CELL = 3.6  # inches, the width of one picture of a grid
_WIDTH = 640  # pixels of a picture: lines and letters drawn on a tiny image would be blocks
_LABEL = 0.022  # points of a label's font per pixel of the image's width


@dataclass
class DrawnObject:
    """One object of a picture."""

    box: Sequence[float]  #: (x0, y0, x1, y1) in pixels of the image
    category: int  #: which sets its colour
    mask: Optional[Any] = None  #: RLE or a (H, W) array; None: the box alone
    label: str = ""  #: text at the box's corner
    mark: str = ""  #: FALSE_ALARM: dashed and crossed out; MISSED: dashes of black and white


def draw_gallery(
    truth: Truth,
    records: Sequence[Mapping[str, Any]],
    found: Mapping[str, Found],
    matches: Mapping[str, Mapping[int, Match]],
    task: str,
    captions: Sequence[str],
    folder: Path,
    image_range: Optional[Sequence[float]] = None,
) -> List[Dict[str, str]]:
    """Write a JPEG per image and model into ``folder``, and side_by_side.jpg with all of them.

    Drawn are the detections of ``matches`` (model -> image id -> match), which may be fewer than those
    ``found``; for the ``task`` "segm" with their masks.  ``image_range`` is that of
    :func:`~sharedkd.data.images.read_image`.

    Returns:
        per record, ground truth or model -> path of the picture below ``folder``.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, files, present = [], [], set()
    for record in records:
        image_id = record["image_id"]
        image = read_image(record["file_name"], "RGB", image_range)
        drawn = {TRUTH: [_object(truth, note, task) for note in truth.objects(image_id)]}
        for name, detections in found.items():
            drawn[name] = _detections(truth, image_id, detections, matches[name][image_id], task)
        paths, row = {}, []
        for number, (name, objects) in enumerate(drawn.items()):
            for each in objects if len(objects) > _FULL else ():
                each.label = ""
            present |= {each.category for each in objects}
            picture = Image.fromarray(draw_objects(image, objects))
            picture.thumbnail((_WIDTH, picture.height))
            paths[name] = f"images/{image_id}_{number}.jpg"
            picture.save(folder / paths[name], quality=85)
            row.append(np.asarray(picture))
        rows.append(row)
        files.append(paths)
    classes = {name: i for i, name in enumerate(truth.classes.values()) if i in present}
    grid = _grid(rows, [TRUTH, *found], captions, classes)
    grid.savefig(folder / "side_by_side.jpg", dpi=120)
    return files


def _object(truth: Truth, note: Mapping[str, Any], task: str) -> DrawnObject:
    """An annotation, or a detection in COCO's form."""
    x, y, width, height = note["bbox"]
    return DrawnObject(
        (x, y, x + width, y + height),
        truth.category_ids.index(note["category_id"]),
        truth.geometry(note, task) if task == "segm" else None,
        truth.classes[note["category_id"]],
    )


def _detections(
    truth: Truth, image_id: int, found: Found, match: Match, task: str
) -> List[DrawnObject]:
    """The detections of ``match``, which are the surest ones, then the objects that they miss."""
    objects, drawn = truth.objects(image_id), []
    surest = sorted(found[image_id], key=lambda x: -x["score"])
    for x, kind in zip(surest, match.kinds):
        drawn.append(_object(truth, x, task))
        drawn[-1].label += f" {x['score']:.0%}"
        drawn[-1].mark = "" if kind in (CORRECT, IGNORED) else FALSE_ALARM
    for i in match.not_found:
        drawn.append(_object(truth, objects[i], "bbox"))
        drawn[-1].label = f"missed: {drawn[-1].label}"
        drawn[-1].mark = MISSED
    return drawn


def draw_objects(image: np.ndarray, objects: Sequence[DrawnObject]) -> np.ndarray:
    """``image`` (H, W, 3) of RGB bytes, enlarged if it is small, with ``objects`` drawn over it."""
    height, width = image.shape[:2]
    visualizer = Visualizer(image, scale=max(1.0, _WIDTH / width))
    for each in objects:
        if each.mask is not None:
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
    color, style = class_color(each.category), "--" if each.mark == FALSE_ALARM else "-"
    visualizer.draw_box(each.box, alpha=1, edge_color=color, line_style=style)
    if each.mark == FALSE_ALARM:
        x0, y0, x1, y1 = each.box
        for ends in ((y0, y1), (y1, y0)):
            visualizer.draw_line((x0, x1), ends, color=color, linewidth=1)


def class_color(category: int, lightness: float = 0.5) -> Tuple[float, float, float]:
    """The RGB colour of the class ``category``: ``lightness`` 0 is black, 1 is white.

    Golden-ratio steps keep the hues of neighbours far apart.
    """
    return colorsys.hls_to_rgb(category * 0.618034 % 1, lightness, 0.9)


def _grid(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    captions: Sequence[str],
    classes: Mapping[str, int],
) -> Figure:
    """Pictures side by side, one row per image, with a legend of the classes' colours."""
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
    patches = [Patch(color=class_color(i), label=name) for name, i in classes.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=8, fontsize="small")
    return figure
