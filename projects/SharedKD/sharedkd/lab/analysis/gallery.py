"""Pictures of what several detectors find on the images where two of them differ most."""

from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image

from .detections import Found, Truth, match_image, matches
from .drawing import FALSE_ALARM, MISSED, DrawnObject, draw_objects, picture_grid
from .mistakes import CORRECT, IGNORED

__all__ = ["draw_gallery", "most_different", "qualities"]

TRUTH = "ground truth"
_FULL = 12  # objects of a picture that are few enough to be labelled
_WIDTH = 640  # pixels of a picture, at most
_QUALITY = 85  # of JPEG


def qualities(truth: Truth, found: Found, task: str, score_threshold: float) -> Dict[int, float]:
    """Image id -> :attr:`~.mistakes.Match.quality`, from 0 to 1.

    ``truth``, ``found``, ``task`` and ``score_threshold`` are those of
    :func:`~.detections.matches`.
    """
    of = matches(truth, found, task, score_threshold)
    return {image_id: each.quality for image_id, each in of.items()}


def most_different(ours: Mapping[int, float], theirs: Mapping[int, float], count: int) -> List[int]:
    """The images whose qualities differ most in either direction, the largest difference first.

    Args:
        ours, theirs: image id -> quality, of the same images.
        count: how many at most; of equals the first ones.

    Returns:
        image ids.
    """
    return sorted(ours, key=lambda i: -abs(ours[i] - theirs[i]))[:count]


def draw_gallery(
    truth: Truth,
    records: Sequence[Mapping[str, Any]],
    found: Mapping[str, Found],
    task: str,
    score_threshold: float,
    captions: Sequence[str],
    folder: Path,
) -> List[Dict[str, str]]:
    """Write a JPEG per image and model, and side_by_side.jpg with all of them.

    Args:
        truth: with the objects of the images.
        records: the images, of the dataset.
        found: model -> its detections.
        task: "bbox" draws boxes, "segm" masks, too.
        score_threshold: detections with a lower score are not drawn.
        captions: one per image.
        folder: created if it does not exist.

    Returns:
        per image, ground truth or model -> path of the picture below ``folder``.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, files = [], []
    order = {category_id: i for i, category_id in enumerate(truth.category_ids)}
    present = set()
    for record in records:
        image = read_image(record["file_name"], format="RGB")
        objects = truth.objects(record["image_id"])
        present |= {note["category_id"] for note in objects}
        drawn = {TRUTH: _truth(truth, objects, order, task)}
        for name, detections in found.items():
            drawn[name] = _found(
                truth, detections, record["image_id"], order, task, score_threshold
            )
            present |= {truth.category_ids[each.category] for each in drawn[name]}
        pictures = {name: _small(draw_objects(image, what)) for name, what in drawn.items()}
        files.append(
            {
                name: _write(picture, folder, f"images/{record['image_id']}_{number}.jpg")
                for number, (name, picture) in enumerate(pictures.items())
            }
        )
        rows.append(list(pictures.values()))
    classes = [(truth.classes[i], order[i]) for i in truth.category_ids if i in present]
    titles = [TRUTH, *found]
    picture_grid(rows, titles, str(folder / "side_by_side.jpg"), captions, classes)
    return files


def _truth(
    truth: Truth, objects: Sequence[Mapping[str, Any]], order: Mapping[int, int], task: str
) -> List[DrawnObject]:
    few = len(objects) <= _FULL
    return [
        DrawnObject(
            _corners(note["bbox"]),
            order[note["category_id"]],
            truth.geometry(note, task) if task == "segm" else None,
            truth.classes[note["category_id"]] if few else "",
        )
        for note in objects
    ]


def _found(
    truth: Truth,
    found: Found,
    image_id: int,
    order: Mapping[int, int],
    task: str,
    score_threshold: float,
) -> List[DrawnObject]:
    """Detections as they are sorted in their match, then the objects that are not found."""
    match = match_image(truth, found, image_id, task, score_threshold)
    sure = sorted(
        (x for x in found[image_id] if x["score"] >= score_threshold), key=lambda x: -x["score"]
    )
    objects = truth.objects(image_id)
    few = len(sure) + len(match.not_found) <= _FULL
    drawn = [
        DrawnObject(
            _corners(x["bbox"]),
            order[x["category_id"]],
            x["segmentation"] if task == "segm" else None,
            f"{truth.classes[x['category_id']]} {x['score']:.0%}" if few else "",
            "" if kind in (CORRECT, IGNORED) else FALSE_ALARM,
        )
        for x, kind in zip(sure, match.kinds)
    ]
    for i in match.not_found:
        label = f"missed: {truth.classes[objects[i]['category_id']]}" if few else ""
        drawn.append(
            DrawnObject(
                _corners(objects[i]["bbox"]), order[objects[i]["category_id"]], None, label, MISSED
            )
        )
    return drawn


def _corners(box: Sequence[float]) -> List[float]:
    x, y, width, height = box
    return [x, y, x + width, y + height]


def _small(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    if width <= _WIDTH:
        return picture
    size = (_WIDTH, round(height * _WIDTH / width))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def _write(picture: np.ndarray, folder: Path, name: str) -> str:
    Image.fromarray(picture).save(folder / name, quality=_QUALITY)
    return name
