"""A small data set of drawn shapes, with boxes and masks, to try every part of a run without data.

The class is the outline.  Hue gives a hint, so that minutes of training from random weights show;
neighbours share hues, and textures, stretch, rotation, clutter, occlusion and small objects keep
the data from being solved.
"""

import json
import math
import os
from pathlib import Path
from typing import Dict, List, Sequence, Tuple, Union

import cv2
import numpy as np
import pycocotools.mask as mask_util
from iopath.common.file_io import file_lock

__all__ = ["CLASSES", "make_shapes"]

CLASSES = ("circle", "ring", "triangle", "square", "star", "cross")

# Increase when the same arguments give other pictures, so that folders written before are redone.
_FORMAT = 1
_PARAMS_FILE = "params.json"
_SPLITS = ("train", "val")
# Circumscribed radius of an object, as a share of the image's shorter side.
_RADII = (0.1, 0.4)
_MOST_OBJECTS = 5
_EMPTY_SHARE = 0.05
# An object of which less is visible would be a guess, so it is neither labelled nor drawn.
_LEAST_VISIBLE = 0.3
_SUBPIXEL_BITS = 4


def make_shapes(
    root: Union[str, Path],
    train: int = 400,
    val: int = 100,
    size: Sequence[int] = (192, 192),
    seed: int = 0,
) -> Path:
    """Write the data set unless ``root`` already holds it, made with the same arguments.

    ``root`` gets ``train.json`` and ``val.json`` (COCO format, polygons and RLE) and the folders
    ``train/`` and ``val/`` that they are relative to; files of these names are overwritten.  The
    same arguments give the same json files, byte for byte.  Several processes may call it at once.

    Args:
        root: the folder, made if need be.
        train, val: number of images.
        size: height and width in pixels that the images vary about, by up to a quarter.
        seed: of all random choices; image ``i`` does not depend on the number of images.

    Returns:
        ``root``.

    Raises:
        ValueError: for fewer than 1 image or sides below 64 pixels.
    """
    if min(train, val) < 1 or min(size) < 64:
        raise ValueError(
            f"train={train}, val={val}, size={tuple(size)}: at least 1 image and 64 pixels"
        )
    root = Path(root)
    params = {
        "format": _FORMAT,
        "train": train,
        "val": val,
        "size": [int(side) for side in size],
        "seed": seed,
    }
    with file_lock(str(root / _PARAMS_FILE)):
        if not _is_complete(root, params):
            (root / _PARAMS_FILE).unlink(missing_ok=True)
            for split in _SPLITS:
                _write_split(root, split, params)
            # Last and at once: with this file there, everything else is there.
            unfinished = root / (_PARAMS_FILE + ".tmp")
            unfinished.write_text(json.dumps(params))
            os.replace(unfinished, root / _PARAMS_FILE)
    return root


def _is_complete(root: Path, params: Dict) -> bool:
    try:
        if json.loads((root / _PARAMS_FILE).read_text()) != params:
            return False
        written = [{entry.name for entry in os.scandir(root / split)} for split in _SPLITS]
    except (OSError, ValueError):
        return False
    return all((root / f"{split}.json").exists() for split in _SPLITS) and all(
        _file_name(i) in names
        for split, names in zip(_SPLITS, written)
        for i in range(params[split])
    )


def _file_name(index: int) -> str:
    return f"{index:06d}.jpg"


def _write_split(root: Path, split: str, params: Dict) -> None:
    (root / split).mkdir(parents=True, exist_ok=True)
    images: List[Dict] = []
    annotations: List[Dict] = []
    for index in range(params[split]):
        rng = np.random.default_rng([params["seed"], _SPLITS.index(split), index])
        picture, objects = _draw_image(rng, params["size"])
        path = root / split / _file_name(index)
        if not cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, 92]):
            raise OSError(f"cannot write {path}")
        height, width = picture.shape[:2]
        images.append({"id": index + 1, "file_name": path.name, "width": width, "height": height})
        for class_id, mask in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": class_id + 1,
                    "iscrowd": 0,
                    **_describe(mask),
                }
            )
    content = {
        "info": {"description": f"SharedKD shapes, {split}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    (root / f"{split}.json").write_text(json.dumps(content))


def _describe(mask: np.ndarray) -> Dict:
    """Tight box [x, y, w, h], area and segmentation of a (H, W) bool mask, in pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
        "area": int(mask.sum()),
        "segmentation": _polygon(mask) or _rle(mask),
    }


def _polygon(mask: np.ndarray) -> List[List[float]]:
    """The outline of a mask in one piece without holes, else an empty list."""
    # Each pixel becomes 3x3: the outline through the outer ones runs inside the pixels' edges and
    # around their centres, so that it decodes to the very same mask.
    fine = cv2.resize(mask.astype(np.uint8), None, fx=3, fy=3, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if len(contours) != 1:
        return []
    return [np.round((contours[0].reshape(-1) + 0.5) / 3, 2).tolist()]


def _rle(mask: np.ndarray) -> Dict:
    rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def _draw_image(
    rng: np.random.Generator, size: Sequence[int]
) -> Tuple[np.ndarray, List[Tuple[int, np.ndarray]]]:
    """One image, (H, W, 3) uint8, and its objects: (class, visible mask, (H, W) bool)."""
    height, width = (int(round(side * rng.uniform(0.75, 1.25))) for side in size)
    background = rng.uniform(50, 200) + rng.uniform(-20, 20, 3)
    picture = background + _texture(rng, height, width, amplitude=rng.uniform(5, 30))
    _draw_clutter(rng, picture)

    objects = _place_objects(rng, height, width)
    # Placed from front to back, painted from back to front, and whole: the visible parts alone
    # would let the background shine through where two objects meet.
    for class_id, mask, _ in reversed(objects):
        colour = _colour(rng, class_id)
        paint = colour + _texture(rng, height, width, amplitude=rng.uniform(0, 30))
        alpha = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.6)[..., None]
        picture += alpha * (paint - picture)

    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.2, 0.9))
    picture += rng.normal(0, rng.uniform(2, 10), picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8), [
        (class_id, visible) for class_id, _, visible in objects
    ]


def _place_objects(
    rng: np.random.Generator, height: int, width: int
) -> List[Tuple[int, np.ndarray, np.ndarray]]:
    """Front to back: class, whole mask and visible mask, (H, W) bool."""
    objects: List[Tuple[int, np.ndarray, np.ndarray]] = []
    if rng.random() < _EMPTY_SHARE:
        return objects
    covered = np.zeros((height, width), bool)
    for _ in range(rng.integers(1, _MOST_OBJECTS + 1)):
        class_id = int(rng.integers(len(CLASSES)))
        radius = min(height, width) * math.exp(rng.uniform(*np.log(_RADII)))
        # The centre keeps half a radius from the edge: most objects lie whole inside the image.
        centre = [rng.uniform(0.5 * radius, side - 0.5 * radius) for side in (width, height)]
        mask = _fill(_outline(rng, CLASSES[class_id]) * radius + centre, height, width)
        visible = mask & ~covered
        if visible.sum() >= _LEAST_VISIBLE * mask.sum():
            objects.append((class_id, mask, visible))
            covered |= visible
    return objects


def _outline(rng: np.random.Generator, name: str) -> np.ndarray:
    """(contours, points, 2) x, y of a shape within the unit circle, stretched and rotated."""
    if name == "circle":
        contours = [_polar(48)]
    elif name == "ring":
        contours = [_polar(48), _polar(48) * rng.uniform(0.45, 0.65)]
    elif name == "triangle":
        contours = [_polar(3)]
    elif name == "square":
        contours = [_polar(4)]
    elif name == "star":
        contours = [_polar(10) * np.where(np.arange(10) % 2, rng.uniform(0.4, 0.52), 1)[:, None]]
    else:
        arm = rng.uniform(0.2, 0.34)
        corner = np.array([[1, -arm], [1, arm], [arm, arm]])
        quarter = np.array([[0, 1], [-1, 0]])
        contours = [
            np.concatenate([corner @ np.linalg.matrix_power(quarter, i) for i in range(4)])
            / math.hypot(1, arm)
        ]
    stretch = np.diag([1, rng.uniform(0.65, 1)])
    return np.array(contours) @ _rotation(rng) @ stretch @ _rotation(rng)


def _polar(points: int) -> np.ndarray:
    angles = np.arange(points) * (2 * math.pi / points)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _rotation(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, sin], [-sin, cos]])


def _fill(contours: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mask, (H, W) bool, of the contours' inside; a contour within another is a hole."""
    mask = np.zeros((height, width), np.uint8)
    points = np.round(contours * 2**_SUBPIXEL_BITS).astype(np.int32)
    cv2.fillPoly(mask, list(points), 1, shift=_SUBPIXEL_BITS)
    return mask.astype(bool)


def _colour(rng: np.random.Generator, class_id: int) -> np.ndarray:
    """A colour of the class's hue or so: the hues of two neighbours overlap, outlines decide."""
    hue = (class_id + rng.uniform(-0.6, 0.6)) * 180 / len(CLASSES) % 180
    hsv = np.uint8([[[hue, rng.uniform(110, 255), rng.uniform(110, 255)]]])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(float)


def _direction(rng: np.random.Generator) -> np.ndarray:
    """A random unit vector in colour space."""
    vector = rng.normal(size=3)
    return vector / np.linalg.norm(vector)


def _texture(rng: np.random.Generator, height: int, width: int, amplitude: float) -> np.ndarray:
    """(H, W, 3) float64 offsets to a colour, of a random kind, at most about ``amplitude``."""
    y, x = np.mgrid[:height, :width]
    angle = rng.uniform(0, math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    kind = rng.integers(4)
    if kind == 0:  # gradient
        pattern = 2 * (along - along.min()) / (along.max() - along.min()) - 1
    elif kind == 1:  # stripes
        pattern = np.sin(along * (2 * math.pi / rng.uniform(4, 24)))
    elif kind == 2:  # checks
        across = y * math.cos(angle) - x * math.sin(angle)
        period = rng.uniform(5, 20)
        pattern = np.where((along // period + across // period) % 2, 1.0, -1.0)
    else:  # clouds, a colour of their own in each channel
        cells = rng.uniform(-1, 1, (*rng.integers(3, 24, 2), 3))
        return amplitude * cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC)
    return amplitude * pattern[..., None] * _direction(rng)


def _draw_clutter(rng: np.random.Generator, picture: np.ndarray) -> None:
    """Lines, arcs and soft spots, which are not objects, drawn into ``picture``."""
    height, width = picture.shape[:2]
    background = picture.mean((0, 1))
    for _ in range(rng.integers(0, 6)):
        colour = np.clip(background + rng.uniform(20, 90) * _direction(rng), 0, 255)
        start, end = (rng.integers(0, (width, height)).tolist() for _ in range(2))
        kind = rng.integers(3)
        if kind == 0:
            cv2.line(picture, start, end, colour.tolist(), int(rng.integers(1, 4)), cv2.LINE_AA)
        elif kind == 1:
            axes = rng.integers(8, 60, 2).tolist()
            first = int(rng.integers(360))
            last = first + int(rng.integers(40, 200))
            cv2.ellipse(picture, start, axes, 0, first, last, colour.tolist(), 2)
        else:
            y, x = np.ogrid[:height, :width]
            squared = (x - start[0]) ** 2 + (y - start[1]) ** 2
            alpha = np.exp(-squared / (2 * rng.uniform(3, 15) ** 2))[..., None]
            picture += alpha * (colour - picture)
