"""The boxes of a COCO json, judged together: other numbers than x, y, width, height in pixels are found."""

import os
from collections import Counter
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from .masks import box_of, fault, is_number, shown
from .notes import CLIPPED, FLAT, OUTSIDE, Notes

__all__ = ["Placed", "settle_boxes"]

_TELLING = 8  # pixels: of a smaller object, the centre is too close to the corner
_SLACK = 1.0  # pixels: COCO's own boxes stick out by fractions of one
# The two images of COCO train2017 with a box of height 0.  Detectron2's mapper drops such boxes.
_COCO_FLAT_BOXES = {"000000200365.jpg", "000000550395.jpg"}


class Placed(NamedTuple):
    """An annotation with its image.

    Args:
        number: its place in the file.
        row, image: its record and that of its image, whose size is known where ``sound`` is true.
        where: what messages call it.
    """

    number: int
    row: Dict[str, Any]
    image: Dict[str, Any]
    where: str

    @property
    def size(self) -> Tuple[int, int]:
        """(height, width) of the image in pixels."""
        return self.image["height"], self.image["width"]


def settle_boxes(them: List[Placed], notes: Notes) -> List[Placed]:
    """Judge the boxes of a file, clip those over an edge, leave out those that show nothing."""
    sound = [x for x in them if x.image["sound"]]
    if not sound:
        return them
    boxes = np.array([x.row["bbox"] for x in sound], dtype=np.float64)
    sizes = np.array([x.size[::-1] for x in sound], dtype=np.float64)
    reading = _other_reading(sound, boxes, sizes)
    if reading:
        notes.refuse(*reading)
        return them
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    over = np.maximum(-start, end - sizes).max(axis=1)
    flat = (boxes[:, 2:] <= 0).any(axis=1)
    outside = (start >= sizes).any(axis=1) | (end <= 0).any(axis=1)
    dropped = set()
    for j in np.flatnonzero(flat | outside | (over > _SLACK)).tolist():
        x, box = sound[j], sound[j].row["bbox"]
        example = f"{x.where} has box {shown(box)}, its image is {x.size[1]}x{x.size[0]}"
        if flat[j] and box[3] == 0 < box[2] and _is_of_coco(x.image["file_name"]):
            continue
        if flat[j] or outside[j]:
            notes.repair(FLAT if flat[j] else OUTSIDE, example)
            dropped.add(x.number)
            continue
        notes.repair(CLIPPED, f"{example}, over by {over[j]:.4g} px")
        low, high = np.clip(start[j], 0, sizes[j]), np.clip(end[j], 0, sizes[j])
        if is_number(x.row.get("area")) and np.isclose(x.row["area"], box[2] * box[3]):
            x.row["area"] = float(np.prod(high - low))
        x.row["bbox"] = [*low.tolist(), *(high - low).tolist()]
    return [x for x in them if x.number not in dropped]


def _is_of_coco(file_name: str) -> bool:
    return os.path.basename(file_name) in _COCO_FLAT_BOXES


def _other_reading(
    sound: List[Placed], boxes: np.ndarray, sizes: np.ndarray
) -> Optional[Tuple[str, str]]:
    """(what the boxes of a file are instead of x, y, width, height in pixels, the fix), or None."""
    n, start, sides = len(boxes), boxes[:, :2], boxes[:, 2:]
    height, width = sound[0].size
    first = f"the first is {shown(sound[0].row['bbox'])} in an image of {width}x{height}"
    shares = ((boxes >= 0) & (boxes <= 1)).all(1) & (sides > 0).all(1) & (sizes > 2).all(1)
    if shares.sum() > 0.1 * n and (boxes[shares] % 1).any():
        what = f"{shares.sum()} of {n} boxes lie within 0 and 1: shares of the image, not pixels"
        fix = "multiply x and width by the image's width, y and height by its height"
        return f"{what} ({first})", fix
    asked, readings = _around_masks(sound, boxes)
    fix = "write bbox as [x, y, width, height] in pixels, x and y of the upper left corner"
    for reading, count in readings.items():
        if count > 0.5 * asked:
            return f"{count} of {asked} boxes are {reading} of their segmentation ({first})", fix
    fix = "write bbox as [x, y, width, height]: subtract x from the third number, y from the fourth"
    could_be = (sides > start).all() and (sides <= sizes + _SLACK).all()
    over = (start + sides - sizes > np.maximum(_SLACK, 0.05 * sizes)).any(axis=1).sum()
    if could_be and over > (0.1 if n >= 8 else 0.5) * n:
        what = f"{over} of {n} boxes reach over the edge as x, y, width, height"
        return f"{what}, and none as corners x0, y0, x1, y1 ({first})", fix
    return None


def _around_masks(sound: List[Placed], boxes: np.ndarray) -> Tuple[int, Counter]:
    """(how many of up to 1000 objects have a mask that can tell, of how many the box is what else of it)."""
    asked, readings = 0, Counter()
    for j in range(0, len(boxes), max(1, len(boxes) // 1000)):
        mask, size = sound[j].row.get("segmentation"), sound[j].size
        if not mask or fault(mask, *size):
            continue
        x0, y0, x1, y1 = box_of(mask, *size)
        width, height = x1 - x0, y1 - y0
        if min(width, height) < _TELLING:
            continue
        asked += 1
        box, meant = boxes[j], (x0, y0, width, height)
        slack = np.maximum(1, 0.05 * np.array([width, height] * 2))
        if (np.abs(box - meant) <= 2 * slack).all():
            continue
        for reading, numbers, others in (
            ("the corners x0, y0, x1, y1", box, (x0, y0, x1, y1)),
            ("the centre and the size", box, (x0 + width / 2, y0 + height / 2, width, height)),
            ("y, x, height, width", box[[1, 0, 3, 2]], meant),
            ("percents", box * (size[::-1] * 2) / 100, meant),
        ):
            readings[reading] += bool((np.abs(numbers - others) <= slack).all())
    return asked, readings
