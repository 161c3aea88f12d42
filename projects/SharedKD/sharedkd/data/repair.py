"""One pass over the records of a COCO json: what has one meaning is repaired, what has none is refused.

Each function takes the records of one kind, changes them in place, and tells
:class:`~sharedkd.data.notes.Notes` what it did.  Nothing is raised, so that everything about a file is
said at once.
"""

import json
import math
import os
import re
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence, Set

from . import notes as kinds
from .boxes import Placed, settle_boxes
from .foreign import foreign_file, foreign_json
from .masks import (
    MOST_PIXELS,
    are_numbers,
    area_of,
    as_polygons,
    box_of,
    fault,
    is_int,
    is_number,
    shown,
)
from .notes import Kind, Notes

__all__ = ["is_root", "read_json", "settle_annotations", "settle_categories", "settle_images"]

_LARGEST_ID = 2**63 - 1  # COCO evaluation sorts ids as 64-bit integers


# --- the file ---------------------------------------------------------------------------------------


PARTS = ("images", "annotations", "categories")


def read_json(notes: Notes, parts: Sequence[str] = PARTS) -> Optional[Dict[str, Any]]:
    """The parsed file, whose lists ``parts`` hold objects alone; None if it is refused."""
    path = notes.json_file
    try:
        named = foreign_file(path) if os.path.isdir(path) else None
        if named is None:
            with open(path, "rb") as f:
                content = f.read()
            data = json.loads(content)
            if content[:2] in (b"\xef\xbb", b"\xff\xfe", b"\xfe\xff") or 0 in content[:4]:
                notes.repair(kinds.ENCODING, f"it begins with {content[:4]!r}")
            named = foreign_json(data)
    except OSError as e:
        notes.refuse(f"cannot be read ({e.strerror})", "name an existing COCO json file")
        return None
    except RecursionError:
        notes.refuse("not a JSON file of COCO's kind: nested too deeply", "export it again")
        return None
    except ValueError as e:
        named = foreign_file(path)
        if named is None:
            fix = "export it again, in UTF-8"
            notes.refuse(f"not a JSON file, or cut short ({e})", fix)
            return None
    if named is not None:
        notes.refuse(f"is {named[0]}, not COCO json", named[1])
        return None

    fix = f"a COCO json is an object with the lists {', '.join(PARTS)}"
    if not isinstance(data, dict):
        notes.refuse(f"holds a {type(data).__name__}", fix)
        return None
    for part in parts:
        if not isinstance(data.get(part), list):
            notes.refuse(f"no list {part!r}", fix)
        elif not data[part] and part != "annotations":
            notes.refuse(f"{part!r} is empty", fix)
        else:
            for i, item in enumerate(data[part]):
                if not isinstance(item, dict):
                    notes.refuse(f"{part}[{i}] is {shown(item)}", "each item must be a JSON object")
            notes.totals[part] = len(data[part])
    return None if notes.refused else data


def _whole(value: Any) -> Optional[int]:
    """The whole number that ``value`` is, or names as text or with a decimal point; else None."""
    if is_int(value):
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,30}(\.0*)?\s*", value):
        return int(value.partition(".")[0])
    return None


def _id(value: Any) -> Any:
    """What an id is known by: a whole number, or text that names none; else None."""
    number = _whole(value)
    return value if number is None and isinstance(value, str) and value else number


def _rows_by_id(rows: List[Dict[str, Any]], part: str, notes: Notes) -> Dict[Any, Dict[str, Any]]:
    """The rows by what their id is known by; rows that are repeated once."""
    found: Dict[Any, Dict[str, Any]] = {}
    for i, row in enumerate(rows):
        key = _id(row.get("id"))
        if key is None:
            fix = "give each an id: a whole number (3, not 3.5) or text"
            notes.refuse(f"{part}[{i}] has id {shown(row.get('id'))}", fix)
        elif key not in found:
            found[key] = row
        elif all(row.get(x) == found[key].get(x) for x in ("name", "file_name", "width", "height")):
            notes.repair(kinds.REPEATED, f"id {key} of {part}")
        else:
            notes.refuse(f"{part} has id {key} twice", f"make the ids of {part} unique")
    return found


def _number(found: Dict[Any, Dict[str, Any]], kind: Kind, notes: Notes) -> None:
    """Give rows ids that are whole numbers of 63 bits: their own, or 1, 2, ... if one has none."""
    bad = [key for key in found if not is_int(key) or abs(key) > _LARGEST_ID]
    for key in bad:
        notes.repair(kind, f"id {shown(key)}")
    for i, (key, row) in enumerate(found.items()):
        if not bad and not is_int(row["id"]):
            notes.repair(kinds.TEXT_NUMBERS, f"id {shown(row['id'])} of {kind.of}")
        row["id"] = i + 1 if bad else key


# --- images -----------------------------------------------------------------------------------------


def settle_images(document: Dict[str, Any], notes: Notes) -> Dict[Any, Dict[str, Any]]:
    """The images by what annotations call them; of those at fault ``sound`` is False.

    ``width`` and ``height`` may both be None: they are read from the image later.
    """
    found = _rows_by_id(document["images"], "images", notes)
    for image in found.values():
        image["sound"] = _settle_image(image, notes)
    _number(found, kinds.IMAGE_IDS, notes)
    document["images"] = list(found.values())
    return found


def _settle_image(image: Dict[str, Any], notes: Notes) -> bool:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        fix = "give each image its file_name"
        notes.refuse(f"image id {image['id']} has file_name {shown(name)}", fix)
        return False
    if image.get("width") is None and image.get("height") is None:
        image["width"] = image["height"] = None
        return True
    for side in ("width", "height"):
        value = _whole(image.get(side))
        if value is None or value <= 0:
            problem = f"image {name!r} has {side} {shown(image.get(side))}"
            notes.refuse(problem, "write the image's size in whole pixels")
            return False
        if not is_int(image[side]):
            notes.repair(kinds.TEXT_NUMBERS, f"{side} {shown(image[side])} of image {name!r}")
            image[side] = value
    if image["width"] * image["height"] > MOST_PIXELS:
        size = f"{shown(image['width'])}x{shown(image['height'])}"
        fix = f"correct its width and height; an image cannot be read beyond {MOST_PIXELS} pixels"
        notes.refuse(f"image {name!r} is said to have {size} pixels", fix)
        return False
    return True


# --- categories -------------------------------------------------------------------------------------


def settle_categories(document: Dict[str, Any], notes: Notes) -> Dict[Any, Dict[str, Any]]:
    """The categories by what annotations call them.

    Each gets ``used``, its number of annotations, and None for a ``name`` that is no text.
    """
    found = _rows_by_id(document["categories"], "categories", notes)
    used = Counter(_id(a.get("category_id")) for a in document["annotations"])
    names: Set[str] = set()
    for key, row in found.items():
        name, row["used"] = row.get("name"), used[key]
        row["name"] = name if isinstance(name, str) else None
        if row["name"] is None or not name.strip():
            notes.refuse(f"category id {key} has name {shown(name)}", "give each category a name")
            continue
        if not _is_text(name):
            fix = "write it in characters that UTF-8 has"
            notes.refuse(f"category id {key} has name {shown(name)}", fix)
        elif name in names:
            notes.refuse(f"two categories are called {name!r}", "rename or merge them")
        names.add(name)
    _number(found, kinds.CATEGORY_IDS, notes)
    return found


def _is_text(value: str) -> bool:
    """False for half a character, such as JSON's "\\ud800", which no log or report can hold."""
    try:
        return bool(value.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def is_root(row: Dict[str, Any], rows: List[Dict[str, Any]]) -> bool:
    """Whether a category without objects stands for no class: a root of others, or a background."""
    others = [str(other.get("supercategory")) for other in rows if other is not row]
    name, above = str(row.get("name")), str(row.get("supercategory"))
    first_of_roboflow = row["id"] == 0 and above == "none" and "none" not in others
    background = name.strip("_ ").lower() in ("background", "ignore")
    return name in others or first_of_roboflow or background


# --- annotations ------------------------------------------------------------------------------------


def settle_annotations(
    document: Dict[str, Any],
    images: Dict[Any, Dict[str, Any]],
    classes: Dict[Any, int],
    notes: Notes,
) -> None:
    """Repair the annotations of a document, and leave out those that stand for nothing.

    Args:
        images: of :func:`settle_images`; those that are ``sound`` have their size.
        classes: what annotations call a category -> its id.
    """
    rows = document["annotations"]
    times = Counter(repr(a.get("id")) for a in rows)
    bad = [a for a in rows if not _is_good_id(a.get("id")) or times[repr(a["id"])] > 1]
    for a in bad:
        notes.repair(kinds.ANNOTATION_IDS, f"id {shown(a.get('id'))}")
    kept = []
    for i, a in enumerate(rows):
        where = f"annotation id {a['id']}" if _is_good_id(a.get("id")) else f"annotations[{i}]"
        image, category = images.get(_id(a.get("image_id"))), classes.get(_id(a.get("category_id")))
        if image is None:
            example = f"{where} is of image {shown(a.get('image_id'))}, which does not exist"
            notes.repair(kinds.NO_IMAGE, example)
        elif category is None:
            example = f"{where} is of category {shown(a.get('category_id'))}, which does not exist"
            notes.repair(kinds.NO_CATEGORY, example)
        else:
            for field, value in (("image_id", image["id"]), ("category_id", category)):
                if not is_int(a[field]) and _whole(a[field]) is not None:
                    notes.repair(kinds.TEXT_NUMBERS, f"{field} {shown(a[field])} of {where}")
                a[field] = value
            where += f" of image {image['file_name']!r}" if image["sound"] else ""
            x = Placed(i, a, image, where)
            if _settle_alone(x, notes):
                kept.append(x)
    kept = settle_boxes(kept, notes)
    for x in kept:
        given, mask = x.row.get("area"), x.row.get("segmentation")
        if x.image["sound"] and (not is_number(given) or given < 0):
            notes.repair(kinds.NO_AREA, f"{x.where} has area {shown(given)}")
            x.row["area"] = area_of(mask, *x.size) if mask else math.prod(x.row["bbox"][2:])
    document["annotations"] = [x.row for x in kept]
    if bad:
        for i, a in enumerate(document["annotations"]):
            a["id"] = i + 1


def _is_good_id(value: Any) -> bool:
    return is_int(value) and 0 < value <= _LARGEST_ID


def _settle_alone(x: Placed, notes: Notes) -> bool:
    """Repair all of an annotation that can be judged alone.  Returns whether to keep it."""
    _settle_crowd(x, notes)
    points = x.row.get("keypoints")
    # Detectron2 shifts those of any kind as it reads the file.
    if points is not None and not (isinstance(points, list) and are_numbers(points)):
        fix = "write keypoints as finite numbers [x1, y1, visibility1, ...], or remove them"
        notes.refuse(f"{x.where} has keypoints {shown(points)}", fix)
    if x.image["sound"] and not _settle_mask(x, notes):
        return False
    return _settle_box(x, notes)


def _settle_crowd(x: Placed, notes: Notes) -> None:
    given = x.row.get("iscrowd")
    number = _whole(int(given) if isinstance(given, bool) else given)
    if given is None:
        notes.repair(kinds.NO_CROWD, x.where)
    elif number not in (0, 1):
        fix = "write 0 for an object, 1 for a crowd region"
        notes.refuse(f"{x.where} has iscrowd {shown(given)}", fix)
    elif not is_int(given):
        notes.repair(kinds.ODD_CROWD, f"{x.where} has iscrowd {shown(given)}")
    x.row["iscrowd"] = number or 0
    if x.row.get("ignore", 0) != 0:
        fix = "remove 'ignore': Detectron2 does not support it; mark crowd regions by iscrowd 1"
        notes.refuse(f"{x.where} has ignore {shown(x.row['ignore'])}", fix)


def _settle_mask(x: Placed, notes: Notes) -> bool:
    """Make ``segmentation`` one that pycocotools can take.  Returns False if nothing is left of it."""
    mask, masks = x.row.get("segmentation"), notes.reading.masks
    if isinstance(mask, list) and mask:
        polygons = [p for p in as_polygons(mask) if p != []]
        if polygons != mask:
            notes.repair(kinds.ONE_LIST, x.where)
        found = [(p, fault([p], *x.size)) for p in polygons]
        good = [(p, problem) for p, problem in found if not (problem and _is_harmless(p, problem))]
        if len(good) < len(found) and (good or masks):
            example = f"{x.where} {next(problem for _, problem in found if problem)}"
            notes.repair(kinds.FEW_POINTS if good else kinds.NO_MASK, example)
            if not good:
                return False
            found = good
        x.row["segmentation"] = [p for p, _ in found]
        problem = next((problem for _, problem in found if problem), "")
    else:
        problem = fault(mask, *x.size)
    if problem and masks:
        fix = "write polygons [[x1, y1, x2, y2, x3, y3, ...]] in pixels or RLE of the image's size"
        notes.refuse(f"{x.where} {problem}", f"{fix}, or remove the object")
    elif problem:
        notes.repair(kinds.UNUSED_MASK, f"{x.where} {problem}")
        del x.row["segmentation"]
    return True


def _is_harmless(polygon: Any, problem: str) -> bool:
    """Whether a polygon shows nothing: it has too few points, or lies outside of its image."""
    numbers = isinstance(polygon, list) and are_numbers(polygon)
    return numbers and (len(polygon) < 6 or "lies outside" in problem)


def _settle_box(x: Placed, notes: Notes) -> bool:
    """Make ``bbox`` four numbers.  Returns False if it is none, which is refused."""
    box, mask = x.row.get("bbox"), x.row.get("segmentation")
    if box in (None, []) and mask and x.image["sound"] and not fault(mask, *x.size):
        x0, y0, x1, y1 = box_of(mask, *x.size)
        box = [x0, y0, x1 - x0, y1 - y0]
        notes.repair(kinds.NO_BOX, x.where)
    elif isinstance(box, list) and any(isinstance(side, str) for side in box):
        try:
            box = [float(side) if isinstance(side, str) else side for side in box]
            notes.repair(kinds.TEXT_NUMBERS, f"bbox {shown(x.row['bbox'])} of {x.where}")
        except ValueError:
            pass
    x.row["bbox"] = box
    if not (isinstance(box, list) and len(box) == 4 and are_numbers(box)):
        fix = "write bbox as four finite numbers [x, y, width, height] in pixels"
        notes.refuse(f"{x.where} has bbox {shown(box)}", fix)
        return False
    if min(box[2:]) < 0:
        fix = "width and height must be above 0: correct or remove it"
        notes.refuse(f"{x.where} has a box of negative size {shown(box)}", fix)
        return False
    return True
