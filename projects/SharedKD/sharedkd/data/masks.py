"""Which segmentations pycocotools' native code can take: it reads and writes out of bounds for others."""

import reprlib
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import pycocotools.mask as mask_util

__all__ = [
    "LARGEST",
    "MOST_PIXELS",
    "are_numbers",
    "area_of",
    "as_polygons",
    "box_of",
    "fault",
    "is_int",
    "is_number",
    "shown",
]

# Pillow, and with it Detectron2's reader, opens no larger image.  Up to 2**29 a mask's run lengths
# fit into the six characters that pycocotools reserves for each.
MOST_PIXELS = 2 * 89_478_485
# Larger numbers do not survive float64, in which COCO evaluation keeps them.
LARGEST = 2**53
# Pixels along a polygon: pycocotools takes some 100 bytes for each, whatever the file's size.
_LONGEST_OUTLINE = 2_000_000
# Characters of one number in a compressed mask: 5 bits each.
_MOST_DIGITS, _BITS = 6, 5


def is_int(value: Any) -> bool:
    """Whether ``value`` is a whole number; true, false and 3.0 are none."""
    return type(value) is int


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number from -LARGEST to :data:`LARGEST`; true and false are none."""
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST


def are_numbers(values: List[Any]) -> bool:
    """Whether each of ``values`` is a number, as :func:`is_number` says."""
    if not {*map(type, values)} <= {int, float}:
        return False
    try:
        return bool(np.abs(np.array(values, dtype=np.float64)).max(initial=0) <= LARGEST)
    except OverflowError:
        return False


def shown(value: Any) -> str:
    """``value`` for a message, shortened; None is "none"."""
    return "none" if value is None else reprlib.repr(value)


def fault(segmentation: Any, height: int, width: int) -> str:
    """What is wrong with a segmentation of an image of that size, '' if nothing is.

    Args:
        segmentation: polygons [[x1, y1, x2, y2, x3, y3, ...], ...] in pixels; RLE ``{"size", "counts"}``
            with a list or a string of counts; None or [] for none.
        height, width: in pixels, at most MOST_PIXELS together.
    """
    if segmentation is None or segmentation == []:
        return ""
    if isinstance(segmentation, dict):
        return _rle_fault(segmentation, height, width)
    if not isinstance(segmentation, list):
        return f"has segmentation {shown(segmentation)}"
    return next(filter(None, (_polygon_fault(p, height, width) for p in segmentation)), "")


def as_polygons(segmentation: List[Any]) -> List[Any]:
    """A list of flat polygons of what is meant as one: a flat polygon, or polygons of [x, y] pairs."""
    if segmentation and are_numbers(segmentation):
        return [segmentation]
    if len(segmentation) > 2 and all(map(_is_pair, segmentation)):
        return [[x for pair in segmentation for x in pair]]
    return [
        [x for pair in p for x in pair]
        if isinstance(p, list) and p and all(map(_is_pair, p))
        else p
        for p in segmentation
    ]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and are_numbers(value)


def area_of(segmentation: Any, height: int, width: int) -> float:
    """Pixels within a segmentation without fault."""
    return float(mask_util.area(_encode(segmentation, height, width)))


def box_of(segmentation: Any, height: int, width: int) -> Tuple[float, ...]:
    """The tight box (x0, y0, x1, y1) of a segmentation without fault, in pixels."""
    if isinstance(segmentation, list):
        xs, ys = ([c for p in segmentation for c in p[i::2]] for i in (0, 1))
        return min(xs), min(ys), max(xs), max(ys)
    x, y, w, h = mask_util.toBbox(_encode(segmentation, height, width)).tolist()
    return x, y, x + w, y + h


def _encode(segmentation: Any, height: int, width: int) -> Dict[str, Any]:
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, height, width)
    return segmentation


def _polygon_fault(polygon: Any, height: int, width: int) -> str:
    if not isinstance(polygon, list):
        return f"has {shown(polygon)} for a polygon"
    if len(polygon) < 6 or len(polygon) % 2:
        return f"has a polygon of {len(polygon)} numbers"
    if not are_numbers(polygon):
        return "has a polygon with something else than finite numbers"
    xs, ys = polygon[::2], polygon[1::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        return f"has a polygon that lies outside its {width}x{height} image"
    if max(-left, right - width) > width or max(-top, bottom - height) > height:
        return f"has a polygon that sticks out of its {width}x{height} image by more than its size"
    longest = min(_LONGEST_OUTLINE, 4 * width * height + 16 * (width + height))
    # An exact length is needed only where the longest possible steps would be too much.
    if len(xs) * max(right - left, bottom - top) > longest and _outline(xs, ys) > longest:
        return (
            f"has a polygon of {len(xs)} points whose outline is longer than {longest} px in its "
            f"{width}x{height} image"
        )
    return ""


def _outline(xs: List[float], ys: List[float]) -> float:
    """Length in pixels as pycocotools walks it: each step counts its longer side."""
    steps = (np.abs(np.diff(c, append=c[0])) for c in (xs, ys))
    return float(np.maximum(*steps).sum())


def _rle_fault(rle: Dict[str, Any], height: int, width: int) -> str:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width] or not all(map(is_int, size)):
        return f"has RLE of size {shown(size)}, its image is {[height, width]} (height, width)"
    if isinstance(counts, str):
        runs = _decompress(counts)
        fills = runs is not None and runs.min() >= 0 and runs.sum() == height * width
    else:
        fills = (
            isinstance(counts, list)
            and all(is_int(c) and c >= 0 for c in counts)
            and sum(counts) == height * width
        )
    if fills:
        return ""
    return f"has RLE counts {shown(counts)} that do not fill its {width}x{height} image"


def _decompress(counts: str) -> Optional[np.ndarray]:
    """The run lengths, int64, of a compressed mask; None if it is not one.

    Each character holds five bits, the lowest first, and whether the number goes on; from the fourth
    number on it is the difference to the last but one.
    """
    codes = np.frombuffer(counts.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - ord(
        "0"
    )
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    if digits.max() > _MOST_DIGITS:
        return None
    places = _BITS * (np.arange(codes.size) - np.repeat(starts, digits))
    runs = np.add.reduceat((codes & 31) << places, starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << _BITS * digits, 0)
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return runs
