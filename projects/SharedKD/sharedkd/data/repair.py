"""One pass over the records of a COCO json: what has one meaning is repaired, what has none is refused.

Each function takes the records of one kind, changes them in place, and tells :class:`Notes` what it
did.  Repairs and refusals are counted, each kind with its first example; nothing is raised, so that
everything about a file is said at once.
"""

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

import numpy as np

from sharedkd.errors import ConfigError

from .foreign import foreign_file, foreign_json
from .masks import MOST_PIXELS, are_numbers, area, as_polygons, box, fault, is_int, is_number, shown

__all__ = [
    "Notes",
    "Repair",
    "read_json",
    "settle_annotations",
    "settle_categories",
    "settle_images",
]

_LONGEST_MESSAGE = 1000  # characters
_LARGEST_ID = 2**63 - 1  # COCO evaluation sorts ids as 64-bit integers
_BOX_SLACK = 1.0  # pixels: COCO's own boxes stick out by fractions of one
# The two images of COCO train2017 with a box of height 0.  Detectron2's mapper drops such boxes.
_COCO_FLAT_BOXES = {"000000200365.jpg", "000000550395.jpg"}


class Kind(NamedTuple):
    """One kind of repair.

    Args:
        of: what is counted: images, categories or annotations; "" where the total says nothing.
        what: what was found, in words that follow "3 of 20".
        done: what was done about it.
        most: the share from which on it is refused: so many are no slip.
    """

    of: str
    what: str
    done: str
    most: float = math.inf


IM, CAT, ANN = "images", "categories", "annotations"
ENCODING = Kind("", "file is not in plain UTF-8", "read as what it is")
TEXT_NUMBERS = Kind("", "numbers are text or have a decimal point", "read as whole numbers")
REPEATED = Kind("", "rows are repeated word by word", "listed once")
IMAGE_IDS = Kind(IM, "images have ids that are no number of 63 bits", "numbered anew")
SAME_FILE = Kind(IM, "images are listed twice, under two ids", "taken as one, with all objects")
SIZES = Kind(IM, "images have no width and height", "read from the image")
FILE_NAMES = Kind(IM, "images are named in another way than their files", "matched")
CATEGORY_IDS = Kind(CAT, "categories have ids that are no number of 63 bits", "numbered anew")
NO_CLASS = Kind(CAT, "categories name nothing: a root, a background, unused", "no class")
SAME_CLASSES = Kind(CAT, "classes are not listed, or have another id elsewhere", "matched by name")
ANNOTATION_IDS = Kind(ANN, "annotation ids are 0, text, repeated or missing", "numbered from 1")
NO_IMAGE = Kind(ANN, "annotations are of an image that is not listed", "left out", 0.1)
NO_CATEGORY = Kind(ANN, "annotations are of a category that is not listed", "left out", 0.1)
NO_CROWD = Kind(ANN, "annotations have no iscrowd", "taken as 0, an object")
ODD_CROWD = Kind(ANN, "annotations have an iscrowd that is not 0 or 1", "read as 0 or 1")
NO_AREA = Kind(ANN, "annotations have no area", "that of the mask, or else of the box")
NO_BOX = Kind(ANN, "annotations have no bbox", "the box around the segmentation")
CLIPPED = Kind(ANN, "boxes reached over their image's edge", "clipped")
OUTSIDE = Kind(ANN, "boxes lie outside of their image", "left out", 0.1)
FLAT = Kind(ANN, "boxes have width or height 0", "left out", 0.5)
ONE_LIST = Kind(
    ANN, "polygons are not [[x1, y1, x2, y2, ...]]", "read in the order of their numbers"
)
FEW_POINTS = Kind(ANN, "objects have polygons that show nothing beside others", "those left out")
NO_MASK = Kind(ANN, "objects have no polygon of 3 points in the image", "left out", 0.1)
UNUSED_MASK = Kind(ANN, "segmentations cannot be used", "left out: this run has boxes alone")


@dataclass(frozen=True)
class Repair:
    """A repair that was made.

    Args:
        count: how often; ``total``: of how many, 0 if that says nothing.
        what, done: in words.
        example: the first one.
    """

    count: int
    total: int
    what: str
    done: str
    example: str

    @property
    def problem(self) -> str:
        of = f" of {self.total}" if self.total else ""
        return f"{self.count}{of} {self.what} ({self.example})"

    def __str__(self) -> str:
        return f"{self.problem}: {self.done}"


class Notes:
    """What was repaired in a file and what it is refused for, by kind, each with its first example.

    Args:
        key, json_file: the config key and its file.
        repair: False refuses what would be repaired.

    Attributes:
        totals: the number of images, categories and annotations.
        broken: the annotations that the file is refused for.
    """

    def __init__(self, key: str, json_file: str, repair: bool = True):
        self.key, self.json_file, self._repairs = key, json_file, repair
        self.totals: Counter = Counter()
        self.broken: set = set()
        self._first: Dict[Kind, str] = {}
        self._count: Counter = Counter()
        self._amount: Dict[Kind, float] = {}
        self._refused: Dict[Tuple[str, str, str], List[str]] = {}

    def repair(self, kind: Kind, example: str, amount: float = 0.0) -> None:
        """Count a repair; ``amount`` in pixels."""
        self._first.setdefault(kind, example[:_LONGEST_MESSAGE])
        self._count[kind] += 1
        self._amount[kind] = max(amount, self._amount.get(kind, 0.0))

    def refuse(
        self, problem: str, fix: str, key: str = "", value: str = "", item: Any = None
    ) -> None:
        """Count a reason to refuse the file, or the ``value`` of another ``key``."""
        where = (key or self.key, value or self.json_file, fix)
        self._refused.setdefault(where, []).append(problem[:_LONGEST_MESSAGE])
        if item is not None:
            self.broken.add(item)

    @property
    def refused(self) -> bool:
        """Whether something has no repair."""
        return bool(self._refused)

    @property
    def repairs(self) -> Tuple[Repair, ...]:
        """Those that were made, not those that the file is refused for."""
        return tuple(self._made(kind) for kind in self._count if not self._is_refused(kind))

    @property
    def errors(self) -> List[ConfigError]:
        """Why the file is refused, one for each kind of reason."""
        found = [
            ConfigError(
                key, value, first[0] + f" (and {len(first) - 1} more)" * (len(first) > 1), fix
            )
            for (key, value, fix), first in self._refused.items()
        ]
        for kind in filter(self._is_refused, self._count):
            fix = "correct them in the json"
            fix += ", or use data.repair=True" * (not self._repairs and kind.most > 1)
            found.append(ConfigError(self.key, self.json_file, self._made(kind).problem, fix))
        return found

    def _made(self, kind: Kind) -> Repair:
        by = f" by up to {self._amount[kind]:.4g} px" if self._amount[kind] else ""
        total, first = self.totals[kind.of], self._first[kind]
        return Repair(self._count[kind], total, kind.what + by, kind.done, first)

    def _is_refused(self, kind: Kind) -> bool:
        share = self._count[kind] / max(self.totals[kind.of], 1)
        return not self._repairs or share >= kind.most


# --- the file ---------------------------------------------------------------------------------------


def read_json(notes: Notes) -> Optional[Dict[str, Any]]:
    """The parsed file, whose lists hold objects alone; None if it is refused."""
    path, parts = notes.json_file, ("images", "annotations", "categories")
    try:
        named = foreign_file(path) if os.path.isdir(path) else None
        if named is None:
            with open(path, "rb") as f:
                content = f.read()
            data = json.loads(content)
            if content[:2] in (b"\xef\xbb", b"\xff\xfe", b"\xfe\xff") or 0 in content[:4]:
                notes.repair(ENCODING, f"it begins with {content[:4]!r}")
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

    fix = f"a COCO json is an object with the lists {', '.join(parts)}"
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
    """The rows by what their id is known by; rows repeated word by word once."""
    found: Dict[Any, Dict[str, Any]] = {}
    for i, row in enumerate(rows):
        key = _id(row.get("id"))
        if key is None:
            fix = "give each a whole-number id (3, not 3.5) of at most 18 digits"
            notes.refuse(f"{part}[{i}] has id {shown(row.get('id'))}", fix)
        elif key not in found:
            found[key] = row
        elif {**row, "id": 0} == {**found[key], "id": 0}:
            notes.repair(REPEATED, f"id {key} of {part}")
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
            notes.repair(TEXT_NUMBERS, f"id {shown(row['id'])} of {kind.of}")
        row["id"] = i + 1 if bad else key


# --- images -----------------------------------------------------------------------------------------


def settle_images(document: Dict[str, Any], notes: Notes) -> Dict[Any, Dict[str, Any]]:
    """The images by what annotations call them; of those at fault ``sound`` is False.

    ``width`` and ``height`` may both be None: they are read from the image later.
    """
    found = _rows_by_id(document["images"], "images", notes)
    for image in found.values():
        image["sound"] = _settle_image(image, notes)
    _number(found, IMAGE_IDS, notes)
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
            notes.repair(TEXT_NUMBERS, f"{side} {shown(image[side])} of image {name!r}")
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
    _number(found, CATEGORY_IDS, notes)
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
    masks: bool,
) -> None:
    """Repair the annotations of a document, and leave out those that stand for nothing.

    Args:
        images: of :func:`settle_images`; those that are ``sound`` have their size.
        classes: what annotations call a category -> its id.
        masks: whether the run uses segmentations; else unusable ones do not matter.
    """
    rows = document["annotations"]
    times = Counter(repr(a.get("id")) for a in rows)
    bad = [a for a in rows if not _is_good_id(a.get("id")) or times[repr(a["id"])] > 1]
    for a in bad:
        notes.repair(ANNOTATION_IDS, f"id {shown(a.get('id'))}")
    kept = []
    for i, a in enumerate(rows):
        where = f"annotation id {a['id']}" if _is_good_id(a.get("id")) else f"annotations[{i}]"
        image = images.get(_id(a.get("image_id")))
        listed = image is not None and _id(a.get("category_id")) in classes
        if image is None:
            notes.repair(
                NO_IMAGE, f"{where} is of image {shown(a.get('image_id'))}, which does not exist"
            )
        elif not listed:
            name = shown(a.get("category_id"))
            notes.repair(NO_CATEGORY, f"{where} is of category {name}, which does not exist")
        if image is None or not listed:
            continue
        for field, value in (
            ("image_id", image["id"]),
            ("category_id", classes[_id(a["category_id"])]),
        ):
            if not is_int(a[field]) and _whole(a[field]) is not None:
                notes.repair(TEXT_NUMBERS, f"{field} {shown(a[field])} of {where}")
            a[field] = value
        where += f" of image {image['file_name']!r}" if image["sound"] else ""
        if _settle_annotation(a, where, image, notes, masks, i):
            kept.append((i, a, where, image))
    kept = _settle_boxes(kept, notes)
    for i, a, where, image in kept:
        if image["sound"] and (not is_number(a.get("area")) or a["area"] < 0):
            notes.repair(NO_AREA, f"{where} has area {shown(a.get('area'))}")
            mask = a.get("segmentation")
            size = image["height"], image["width"]
            a["area"] = area(mask, *size) if mask else a["bbox"][2] * a["bbox"][3]
    document["annotations"] = [a for _, a, _, _ in kept]
    if bad:
        for i, a in enumerate(document["annotations"]):
            a["id"] = i + 1


def _is_good_id(value: Any) -> bool:
    return is_int(value) and 0 < value <= _LARGEST_ID


def _settle_annotation(
    a: Dict[str, Any], where: str, image: Dict[str, Any], notes: Notes, masks: bool, i: int
) -> bool:
    """Repair all of an annotation that can be judged alone.  Returns whether to keep it."""
    crowd = a.get("iscrowd")
    if crowd is None:
        notes.repair(NO_CROWD, where)
        a["iscrowd"] = 0
    elif _whole(int(crowd) if isinstance(crowd, bool) else crowd) not in (0, 1):
        fix = "write 0 for an object, 1 for a crowd region"
        notes.refuse(f"{where} has iscrowd {shown(crowd)}", fix, item=i)
    elif not is_int(crowd):
        notes.repair(ODD_CROWD, f"{where} has iscrowd {shown(crowd)}")
        a["iscrowd"] = int(_whole(int(crowd) if isinstance(crowd, bool) else crowd))
    if a.get("ignore", 0) != 0:
        fix = "remove 'ignore': Detectron2 does not support it; mark crowd regions by iscrowd 1"
        notes.refuse(f"{where} has ignore {shown(a['ignore'])}", fix, item=i)
    points = a.get("keypoints")
    # Detectron2 shifts those of any kind as it reads the file.
    if points is not None and not (isinstance(points, list) and are_numbers(points)):
        fix = "write keypoints as finite numbers [x1, y1, visibility1, ...], or remove them"
        notes.refuse(f"{where} has keypoints {shown(points)}", fix, item=i)
    if image["sound"] and not _settle_mask(a, where, image, notes, masks, i):
        return False
    return _settle_numbers(a, where, image, notes, i)


def _settle_mask(
    a: Dict[str, Any], where: str, image: Dict[str, Any], notes: Notes, masks: bool, i: int
) -> bool:
    mask, size = a.get("segmentation"), (image["height"], image["width"])
    if isinstance(mask, list) and mask:
        mask = [p for p in as_polygons(mask) if p != []]
        if mask != a["segmentation"]:
            notes.repair(ONE_LIST, where)
            a["segmentation"] = mask
        found = [(p, fault([p], *size)) for p in mask]
        good = [(p, x) for p, x in found if not (x and _is_harmless(p, x))]
        if len(good) < len(found) and (good or masks):
            example = f"{where} {next(x for _, x in found if x)}"
            notes.repair(FEW_POINTS if good else NO_MASK, example)
            a["segmentation"] = [p for p, _ in good]
            if not good:
                return False
            found = good
        problem = next((x for _, x in found if x), "")
    else:
        problem = fault(mask, *size)
    if problem and masks:
        fix = "write polygons [[x1, y1, x2, y2, x3, y3, ...]] in pixels or RLE of the image's size, or remove the object"
        notes.refuse(f"{where} {problem}", fix, item=i)
    elif problem:
        notes.repair(UNUSED_MASK, f"{where} {problem}")
        del a["segmentation"]
    return True


def _is_harmless(polygon: Any, problem: str) -> bool:
    """Whether a polygon shows nothing: it has too few points, or lies outside of its image."""
    numbers = isinstance(polygon, list) and are_numbers(polygon)
    return numbers and (len(polygon) < 6 or "lies outside" in problem)


def _settle_numbers(
    a: Dict[str, Any], where: str, image: Dict[str, Any], notes: Notes, i: int
) -> bool:
    """Make ``bbox`` four numbers.  Returns False if it is none, which is refused."""
    given = a.get("bbox")
    if given in (None, []) and a.get("segmentation") and image["sound"]:
        if not fault(a["segmentation"], image["height"], image["width"]):
            x0, y0, x1, y1 = box(a["segmentation"], image["height"], image["width"])
            notes.repair(NO_BOX, where)
            a["bbox"] = given = [x0, y0, x1 - x0, y1 - y0]
    if isinstance(given, list) and any(isinstance(x, str) for x in given):
        try:
            a["bbox"] = [float(x) if isinstance(x, str) else x for x in given]
            notes.repair(TEXT_NUMBERS, f"bbox {shown(given)} of {where}")
        except ValueError:
            pass
    found = a.get("bbox")
    if isinstance(found, list) and len(found) == 4 and are_numbers(found):
        if min(found[2:]) >= 0:
            return True
        problem = f"{where} has a box of negative size {shown(found)}"
        notes.refuse(problem, "width and height must be above 0: correct or remove it", item=i)
        return False
    fix = "write bbox as four finite numbers [x, y, width, height] in pixels"
    notes.refuse(f"{where} has bbox {shown(given)}", fix, item=i)
    return False


_Kept = Tuple[int, Dict[str, Any], str, Dict[str, Any]]


def _settle_boxes(kept: List[_Kept], notes: Notes) -> List[_Kept]:
    """Judge the boxes of a file together, clip those over an edge, leave out those without area."""
    sound = [k for k in kept if k[3]["sound"]]
    if not sound:
        return kept
    boxes = np.array([k[1]["bbox"] for k in sound], dtype=np.float64)
    sizes = np.array([[k[3]["width"], k[3]["height"]] for k in sound], dtype=np.float64)
    reading = _other_reading(sound, boxes, sizes)
    if reading:
        problem, fix = reading
        notes.refuse(problem, fix)
        return kept
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    over = np.maximum(-start, end - sizes).max(axis=1)
    flat = (boxes[:, 2:] <= 0).any(axis=1)
    outside = ~flat & ((start >= sizes).any(axis=1) | (end <= 0).any(axis=1))
    dropped = set()
    for j in np.flatnonzero(flat | outside | (over > _BOX_SLACK)).tolist():
        i, a, where, image = sound[j]
        size = f"{image['width']}x{image['height']}"
        if flat[j]:
            if (
                a["bbox"][3] == 0 < a["bbox"][2]
                and os.path.basename(image["file_name"]) in _COCO_FLAT_BOXES
            ):
                continue
            notes.repair(FLAT, f"{where} has an empty box {shown(a['bbox'])}")
            dropped.add(i)
        elif outside[j]:
            notes.repair(OUTSIDE, f"{where} has box {shown(a['bbox'])}, its image is {size}")
            dropped.add(i)
        else:
            notes.repair(
                CLIPPED, f"{where} has box {shown(a['bbox'])}, its image is {size}", over[j]
            )
            low, high = np.clip(start[j], 0, sizes[j]), np.clip(end[j], 0, sizes[j])
            if is_number(a.get("area")) and np.isclose(a["area"], boxes[j, 2] * boxes[j, 3]):
                a["area"] = float(np.prod(high - low))
            a["bbox"] = [*low.tolist(), *(high - low).tolist()]
    return [k for k in kept if k[0] not in dropped]


def _other_reading(
    sound: List[_Kept], boxes: np.ndarray, sizes: np.ndarray
) -> Optional[Tuple[str, str]]:
    """(what the boxes of a file are instead of x, y, width, height in pixels, the fix), or None."""
    n, start, sides = len(boxes), boxes[:, :2], boxes[:, 2:]
    first = (
        f"the first is {shown(sound[0][1]['bbox'])} in an image of {sizes[0, 0]:g}x{sizes[0, 1]:g}"
    )
    shares = ((boxes >= 0) & (boxes <= 1)).all(1) & (sides > 0).all(1) & (sizes > 2).all(1)
    if shares.sum() > 0.1 * n and (boxes[shares] % 1).any():
        what = f"{shares.sum()} of {n} boxes lie within 0 and 1: shares of the image, not pixels"
        fix = "multiply x and width by the image's width, y and height by its height"
        return f"{what} ({first})", fix
    fix = "write bbox as [x, y, width, height]: subtract x from the third number, y from the fourth"
    asked, corners = _around_masks(sound, boxes)
    if corners > 0.5 * asked:
        what = f"{corners} of {asked} boxes are the corners x0, y0, x1, y1 of their segmentation"
        return f"{what} ({first})", fix
    could_be = (sides > start).all() and (sides <= sizes + _BOX_SLACK).all()
    over = (start + sides - sizes > np.maximum(_BOX_SLACK, 0.05 * sizes)).any(axis=1).sum()
    if could_be and over > (0.5 if n < 20 else 0.1) * n:
        what = f"{over} of {n} boxes reach over the edge as x, y, width, height"
        return f"{what}, and none as corners x0, y0, x1, y1 ({first})", fix
    return None


def _around_masks(sound: List[_Kept], boxes: np.ndarray) -> Tuple[int, int]:
    """(how many of up to 1000 objects have a mask, the box of how many is its corners instead)."""
    asked = corners = 0
    for j in range(0, len(boxes), max(1, len(boxes) // 1000)):
        mask, image = sound[j][1].get("segmentation"), sound[j][3]
        if not mask or fault(mask, image["height"], image["width"]):
            continue
        asked += 1
        tight = np.array(box(mask, image["height"], image["width"]))
        slack = np.maximum(1, 0.05 * (tight[2:] - tight[:2]))
        as_corners = np.abs(boxes[j] - tight) <= np.tile(slack, 2)
        as_sides = np.abs(boxes[j, :2] + boxes[j, 2:] - tight[2:]) <= 2 * slack
        large = (tight[2:] - tight[:2] > 2 * slack).all()
        corners += bool(large and as_corners.all() and not as_sides.all())
    return asked, corners
