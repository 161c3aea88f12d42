"""Pictures of the detections of several detectors, with their mistakes marked."""

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np
from PIL import Image

from sharedkd.data.images import read_image

from .detections import Found, Truth
from .drawing import FALSE_ALARM, MISSED, DrawnObject, draw_objects, picture_grid
from .mistakes import CORRECT, IGNORED, Match

__all__ = ["draw_gallery"]

TRUTH = "ground truth"
_FULL = 12  # objects of a picture that are few enough to be labelled
_WIDTH = 640  # pixels of a picture, at most
_QUALITY = 85  # of JPEG


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
    """Write a JPEG per image and model, and side_by_side.jpg with all of them.

    Args:
        truth: with the objects of the images.
        records: the images, of the dataset.
        found: model -> its detections.
        matches: model -> image id -> their match; detections that are not in it are not drawn.
        task: "bbox" draws boxes, "segm" masks, too.
        captions: one per image.
        folder: created if it does not exist.
        image_range: see :func:`~sharedkd.data.images.read_image`.

    Returns:
        per image, ground truth or model -> path of the picture below ``folder``.
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
            if len(objects) > _FULL:
                for each in objects:
                    each.label = ""
            present |= {each.category for each in objects}
            picture = Image.fromarray(draw_objects(image, objects))
            picture.thumbnail((_WIDTH, picture.height))
            paths[name] = f"images/{image_id}_{number}.jpg"
            picture.save(folder / paths[name], quality=_QUALITY)
            row.append(np.asarray(picture))
        rows.append(row)
        files.append(paths)
    classes = [(list(truth.classes.values())[i], i) for i in sorted(present)]
    picture_grid(rows, [TRUTH, *found], str(folder / "side_by_side.jpg"), captions, classes)
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
