"""Own data in COCO format: everything that would stop or spoil a run is found before it starts."""

import copy
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, List, Set, Tuple, Union

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from PIL import Image

from sharedkd.errors import FAILED, ConfigError, Findings, collecting

from .masks import MOST_PIXELS, fault, is_int, is_number, shown

__all__ = ["CocoSummary", "check_coco", "check_same_classes", "register_coco"]

# Pixels that a box may stick out of its image: COCO's own boxes do by fractions of a pixel.
_BOX_SLACK = 1.0
# The two images of COCO train2017 with a box of height 0.  Detectron2's mapper drops such boxes.
_COCO_FLAT_BOXES = {"000000200365.jpg", "000000550395.jpg"}
# Image headers that are read: enough to catch a wrong folder or a resized set within seconds.
_MOST_HEADERS = 1000
_LARGEST_ID = 2**63 - 1  # COCO evaluation sorts them as 64-bit integers
_LONGEST_MESSAGE = 1000  # characters
# More than lie between this module and any place where Detectron2 or pycocotools reads the file.
_SPARE_FRAMES = 200
_EXIF_ORIENTATION, _EXIF_QUARTER_TURNS = 0x0112, (5, 6, 7, 8)

# (path, modification time, size) of a json file -> its categories, as a big file takes seconds to
# parse and both the number of classes and the class names are asked for.
_categories_of: Dict[Tuple[str, int, int], Dict[int, str]] = {}


@dataclass(frozen=True)
class CocoSummary:
    """What a checked json file holds.

    Args:
        key: the config key that names the file.
        json_file: the file.
        images: number of images.
        objects: number of objects to learn or find, crowd regions not counted.
        crowds: number of crowd regions (``iscrowd`` 1).
        empty_images: number of images without an object.
        broken_annotations: number of those for which the file is refused.
        unmasked: number of objects without a segmentation; for evaluation also of crowd regions.
        has_rle: whether some object's segmentation is RLE, which Detectron2's mapper takes with
            ``instance_mask_format="bitmask"`` only.
        categories: category id -> class name, ids ascending.
        refused: something is wrong with the file, so that it cannot be used.
    """

    key: str
    json_file: str
    images: int
    objects: int
    crowds: int
    empty_images: int
    broken_annotations: int
    unmasked: int
    has_rle: bool
    categories: Dict[int, str]
    refused: bool = False

    @property
    def classes(self) -> List[str]:
        """Class names in order of category id: the order of Detectron2's contiguous class ids."""
        return list(self.categories.values())

    @property
    def has_masks(self) -> bool:
        """Whether every object has a segmentation, as training on masks or their evaluation needs."""
        return self.unmasked == 0


@collecting
def check_coco(
    json_file: str,
    image_root: str,
    key: str,
    images_key: str,
    *,
    train: bool = True,
    verify_sizes: bool = True,
    findings: Findings,
) -> CocoSummary:
    """Check a COCO json file and its images; images without objects are fine.

    Args:
        json_file: the annotations.
        image_root: the folder that the images' ``file_name`` are relative to.
        key, images_key: the config keys that hold the two, for messages.
        train: True asks for at least one object.  False asks for what COCO evaluation reads:
            ``area`` and ``iscrowd`` of each annotation, and annotation ids above 0.
        verify_sizes: also compare width and height with the headers of up to 1000 images.
        findings: takes what is wrong.

    Returns:
        what the file holds, also if it is refused.

    Raises:
        ConfigError: for each kind of fault the first one, how many there are like it, and the fix.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    data = _read(json_file, key)
    images, annotations = data["images"], data["annotations"]
    own, faults = Findings(), _Faults()
    categories = own.step(_categories, data, partial(_refuse, key, json_file))
    if categories is not FAILED:
        _categories_of[_stamp(json_file)] = categories
    sound = [image for image in images if faults.note(_of_image(image))]
    ids, sound_by_id = {i["id"] for i in images}, {i["id"]: i for i in sound}
    broken = 0
    for annotation in annotations:
        also = () if train else _of_evaluated(annotation)
        found = _of_annotation(annotation, ids, sound_by_id, categories)
        broken += not faults.note([*found, *also])
    objects = [a for a in annotations if not a.get("iscrowd")]
    if train and not objects:
        fix = "annotate some objects that are not crowd regions"
        faults.note([("no image has an object", fix)])
    for error in faults.errors(key, json_file):
        own.add(error)
    own.step(_check_files, sound, image_root, images_key, key, json_file, verify_sizes)

    occupied = {a["image_id"] for a in objects if is_int(a.get("image_id"))} & ids
    summary = CocoSummary(
        key=key,
        json_file=json_file,
        images=len(images),
        objects=len(objects),
        crowds=len(annotations) - len(objects),
        empty_images=len(images) - len(occupied),
        broken_annotations=broken,
        # Mask evaluation reads those of crowd regions, too; training leaves the regions out.
        unmasked=sum(not a.get("segmentation") for a in (objects if train else annotations)),
        has_rle=any(isinstance(a.get("segmentation"), dict) for a in objects),
        categories={} if categories is FAILED else categories,
        refused=bool(own.errors),
    )
    for each in own.errors:
        findings.add(each)
    return summary


def check_same_classes(train: CocoSummary, val: CocoSummary) -> None:
    """Check that ``train`` and ``val`` have the same category ids with the same names.

    Raises:
        ConfigError: of the key of ``val``, when an id is in one file only or has another name.
    """
    problems = []
    for summary, other in ((train, val), (val, train)):
        alone = sorted(set(summary.categories) - set(other.categories))
        if alone:
            listed = ", ".join(f"{i} {summary.categories[i]!r}" for i in alone[:5])
            problems.append(f"only {summary.key} has {len(alone)}: {listed}")
    for i in train.categories:
        if i in val.categories and train.categories[i] != val.categories[i]:
            names = f"{train.categories[i]!r} and {val.categories[i]!r}"
            problems.append(f"id {i} is {names}")
    if problems:
        raise ConfigError(
            val.key,
            val.json_file,
            f"categories differ from {train.key}={train.json_file} ({problems[0]})",
            "write the same list of categories into both files",
        )


def register_coco(name: str, json_file: str, image_root: str) -> None:
    """Make ``name`` a Detectron2 data set; a data set of that name and other content is replaced.

    Class names and the map of category ids are there at once, before the data are first loaded.

    Args:
        name: in Detectron2's catalogs.
        json_file: the annotations; only their categories are checked here.
        image_root: the folder that the images' ``file_name`` are relative to; not looked at here.

    Raises:
        ConfigError: naming ``name``, when the file or its categories cannot be used.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    categories = _cached_categories(json_file, name)
    metadata = {
        "json_file": json_file,
        "image_root": image_root,
        "evaluator_type": "coco",
        "thing_classes": list(categories.values()),
        "thing_dataset_id_to_contiguous_id": {c: i for i, c in enumerate(categories)},
    }
    if name in DatasetCatalog:
        current = MetadataCatalog.get(name).as_dict()
        if all(current.get(k) == v for k, v in metadata.items()):
            return
        DatasetCatalog.remove(name)
    # Metadata refuse to change their values, so those of another data set must go as a whole.
    if name in MetadataCatalog:
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, partial(load_coco_json, json_file, image_root, name))
    MetadataCatalog.get(name).set(**metadata)


class _Faults:
    """What is wrong with items of a file: of each kind the first, and how many there are.

    A fault is a problem and its fix; what is mended in the same way is of one kind.
    """

    def __init__(self) -> None:
        self._first: Dict[str, str] = {}
        self._count: Counter = Counter()

    def note(self, faults: Iterable[Tuple[str, str]]) -> bool:
        """Count an item's faults.  Returns whether there are none."""
        sound = True
        for problem, fix in faults:
            self._first.setdefault(fix, problem[:_LONGEST_MESSAGE])
            self._count[fix] += 1
            sound = False
        return sound

    def errors(self, key: str, value: str) -> Iterator[ConfigError]:
        for fix, first in self._first.items():
            others = self._count[fix] - 1
            yield ConfigError(key, value, first + f" (and {others} more)" * bool(others), fix)


def _refuse(key: str, value: str, problems: Iterable[str], fix: str) -> None:
    """Raise ConfigError if there are any problems, which are of one kind."""
    faults = _Faults()
    faults.note((problem, fix) for problem in problems)
    for error in faults.errors(key, value):
        raise error


def _read(json_file: str, key: str) -> Dict[str, Any]:
    refuse = partial(_refuse, key, json_file)
    try:
        with open(json_file, encoding="utf-8") as f:
            data = _deeper(_SPARE_FRAMES, json.load, f)
        _deeper(_SPARE_FRAMES, copy.deepcopy, data.get("info") if isinstance(data, dict) else None)
    except OSError as e:
        refuse([f"cannot be read ({e.strerror})"], "name an existing COCO json file")
    except RecursionError:
        refuse(["not a JSON file of COCO's kind: nested too deeply"], "export it again")
    except ValueError as e:
        refuse(
            [f"not a JSON file, or cut short ({e})"],
            "export it again, in UTF-8 without a byte order mark",
        )

    parts = ("images", "annotations", "categories")
    fix = f"a COCO json is an object with the lists {', '.join(parts)}"
    if not isinstance(data, dict):
        refuse([f"holds a {type(data).__name__}"], fix)
    refuse((f"no list {p!r}" for p in parts if not isinstance(data.get(p), list)), fix)
    refuse((f"{p!r} is empty" for p in ("images", "categories") if not data[p]), fix)
    refuse(
        (
            f"{part}[{i}] is {shown(item)}"
            for part in parts
            for i, item in enumerate(data[part])
            if not isinstance(item, dict)
        ),
        "each item must be a JSON object",
    )
    for part in parts:
        refuse(
            (
                f"{part}[{i}] has id {shown(item.get('id'))}"
                for i, item in enumerate(data[part])
                if not is_int(item.get("id")) or abs(item["id"]) > _LARGEST_ID
            ),
            "give each a whole-number id (3, not 3.0 or '3') of at most 18 digits",
        )
        refuse(
            (f"{part} has id {i} twice" for i in _repeated(item["id"] for item in data[part])),
            f"make the ids of {part} unique",
        )
    return data


def _deeper(frames: int, function: Callable, *args: Any) -> Any:
    """Call a function from so far down the stack that what it parses or copies will do elsewhere, too.

    pycocotools parses the file again, and copies its "info", from further down than this module.
    """
    return _deeper(frames - 1, function, *args) if frames else function(*args)


def _categories(
    data: Dict[str, Any], refuse: Callable[[Iterable[str], str], None]
) -> Dict[int, str]:
    names = {c["id"]: c.get("name") for c in sorted(data["categories"], key=lambda c: c["id"])}
    refuse(
        (
            f"category id {i} has name {shown(name)}"
            for i, name in names.items()
            if not isinstance(name, str) or not name.strip()
        ),
        "give each category a name",
    )
    refuse(
        (
            f"category id {i} has name {shown(name)}"
            for i, name in names.items()
            if not _is_text(name)
        ),
        "write it in characters that UTF-8 has",
    )
    refuse(
        (f"two categories are called {name!r}" for name in _repeated(names.values())),
        "rename or merge them",
    )
    return names


def _is_text(value: str) -> bool:
    """False for half a character, such as JSON's "\\ud800", which no log or report can hold."""
    try:
        return bool(value.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def _cached_categories(json_file: str, key: str) -> Dict[int, str]:
    if not os.path.exists(json_file) or _stamp(json_file) not in _categories_of:
        names = _categories(_read(json_file, key), partial(_refuse, key, json_file))
        _categories_of[_stamp(json_file)] = names
    return _categories_of[_stamp(json_file)]


def _stamp(json_file: str) -> Tuple[str, int, int]:
    stat = os.stat(json_file)
    return os.path.abspath(json_file), stat.st_mtime_ns, stat.st_size


def _of_image(image: Dict[str, Any]) -> Iterator[Tuple[str, str]]:
    """An image's faults; without any, its name and size can be relied on."""
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        yield f"image id {image['id']} has file_name {shown(name)}", "give each image its file_name"
        return
    sides = [image.get(side) for side in ("width", "height")]
    for side, value in zip(("width", "height"), sides):
        if not is_int(value) or value <= 0:
            problem = f"image {name!r} has {side} {shown(value)}"
            yield problem, "write the image's size in whole pixels"
            return
    if sides[0] * sides[1] > MOST_PIXELS:
        yield (
            f"image {name!r} is said to have {shown(sides[0])}x{shown(sides[1])} pixels",
            f"correct its width and height; an image cannot be read beyond {MOST_PIXELS} pixels",
        )


def _of_annotation(
    annotation: Dict[str, Any],
    image_ids: Set[int],
    sound: Dict[int, Dict[str, Any]],
    categories: Union[Dict[int, str], Any],
) -> Iterator[Tuple[str, str]]:
    """An annotation's faults.

    Args:
        image_ids: of all images.
        sound: id -> image, of those without faults.
        categories: FAILED if they are at fault themselves.
    """
    a = annotation
    for field, known, what in (
        ("image_id", image_ids, "image"),
        ("category_id", categories, "category"),
    ):
        if known is not FAILED and not (is_int(a.get(field)) and a[field] in known):
            yield (
                f"annotation id {a['id']} is of {what} {shown(a.get(field))}, which does not exist",
                f"correct its {field}, or add the {what}",
            )
    image = sound.get(a["image_id"]) if is_int(a.get("image_id")) else None
    where = f"annotation id {a['id']}" + (f" of image {image['file_name']!r}" if image else "")
    if not _is_box(a.get("bbox")):
        yield (
            f"{where} has bbox {shown(a.get('bbox'))}",
            "write bbox as four finite numbers [x, y, width, height] in pixels",
        )
    elif image and _is_flat(a, image):
        yield (
            f"{where} has an empty box {shown(a['bbox'])}",
            "width and height must be above 0: correct or remove it",
        )
    elif image and (outside := _outside(a, image)):
        yield (
            f"{where} {outside}",
            "bbox is [x, y, width, height] in pixels, not corners: correct, clip or remove it",
        )
    if a.get("iscrowd", 0) not in (0, 1):
        problem = f"{where} has iscrowd {shown(a['iscrowd'])}"
        yield problem, "write 0 for an object, 1 for a crowd region"
    if a.get("ignore", 0) != 0:
        yield (
            f"{where} has ignore {shown(a['ignore'])}",
            "remove 'ignore': Detectron2 does not support it; mark crowd regions by iscrowd 1",
        )
    mask = image and fault(a.get("segmentation"), image["height"], image["width"])
    if mask:
        yield (
            f"{where} {mask}",
            "write polygons [[x1, y1, x2, y2, x3, y3, ...]] in pixels or RLE of the image's size, "
            "or remove the object",
        )
    if not _are_keypoints(a):
        yield (
            f"{where} has keypoints {shown(a['keypoints'])}",
            "write keypoints as finite numbers [x1, y1, visibility1, ...], or remove them",
        )


def _of_evaluated(annotation: Dict[str, Any]) -> Iterator[Tuple[str, str]]:
    """What COCO evaluation cannot work with."""
    area = annotation.get("area")
    if not is_number(area) or area < 0:
        yield (
            f"annotation id {annotation['id']} has area {shown(area)}",
            "COCO evaluation needs it: write the mask's area, or width * height of the box",
        )
    if "iscrowd" not in annotation:
        yield (
            f"annotation id {annotation['id']} has no iscrowd",
            "COCO evaluation needs it: write 0 for an object, 1 for a crowd region",
        )
    if annotation["id"] <= 0:
        yield (
            f"annotation id {annotation['id']} is not above 0",
            "COCO evaluation counts what matches such an object as a miss: number from 1",
        )


def _check_files(
    images: List[Dict[str, Any]],
    image_root: str,
    images_key: str,
    key: str,
    json_file: str,
    verify_sizes: bool,
) -> None:
    """Check that images lie in their folder, are there, and are what the json file says, in turn."""
    refuse = partial(_refuse, images_key, image_root)
    if not os.path.isdir(image_root):
        refuse(["no such folder"], f"name the folder of {key}'s images")
    refuse(
        _strangers(images, image_root),
        f"name a folder that holds all images, / for absolute names, or correct the file_name in {json_file}",
    )
    refuse(
        _missing_files(images, image_root),
        f"put the file there, or correct {images_key} or the file_name in {json_file}",
    )
    if verify_sizes:
        refuse(
            _wrong_headers(images, image_root),
            f"correct the image, or its width and height in {json_file}",
        )


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def _are_keypoints(annotation: Dict[str, Any]) -> bool:
    # Detectron2 shifts those of any kind as it reads the file.
    points = annotation.get("keypoints")
    return points is None or isinstance(points, list) and all(map(is_number, points))


def _is_flat(annotation: Dict[str, Any], image: Dict[str, Any]) -> bool:
    w, h = annotation["bbox"][2:]
    if h == 0 and w > 0 and os.path.basename(image["file_name"]) in _COCO_FLAT_BOXES:
        return False
    return w <= 0 or h <= 0


def _outside(annotation: Dict[str, Any], image: Dict[str, Any]) -> str:
    x, y, w, h = annotation["bbox"]
    width, height = image["width"], image["height"]
    excess = max(-x, -y, x + w - width, y + h - height)
    disjoint = x >= width or y >= height or x + w <= 0 or y + h <= 0
    if not disjoint and excess <= _BOX_SLACK:
        return ""
    how = "lies outside" if disjoint else f"sticks out by {excess:.4g} px of"
    return f"has a box {shown(annotation['bbox'])} that {how} its {width}x{height} image"


def _strangers(images: List[Dict[str, Any]], image_root: str) -> Iterator[str]:
    """Images that lie elsewhere: a json file from someone else must not read what it likes."""
    root = os.path.abspath(image_root)
    prefix = os.path.join(root, "")
    for image in images:
        name = image["file_name"]
        if os.path.isabs(name) or ".." in name:  # else there is nothing to resolve
            if not os.path.abspath(os.path.join(root, name)).startswith(prefix):
                yield f"image file {name!r} lies outside of it"


def _missing_files(images: List[Dict[str, Any]], image_root: str) -> Iterator[str]:
    # One listing for each folder: a look-up for each file is slow on a network drive.
    listings: Dict[str, Set[str]] = {}
    for image in images:
        folder, name = os.path.split(os.path.join(image_root, image["file_name"]))
        if folder not in listings:
            try:
                with os.scandir(folder) as entries:
                    listings[folder] = {e.name for e in entries if e.is_file()}
            except (OSError, ValueError):
                listings[folder] = set()
        if name not in listings[folder]:
            yield f"no image file {image['file_name']!r}"


def _wrong_headers(images: List[Dict[str, Any]], image_root: str) -> Iterator[str]:
    for image in images[:: max(1, math.ceil(len(images) / _MOST_HEADERS))]:
        name, expected = image["file_name"], (image["width"], image["height"])
        try:
            with Image.open(os.path.join(image_root, name)) as picture:
                size, turned = picture.size, _is_turned(picture)
        except Exception as e:  # Pillow's decoders raise what they please
            yield f"{name!r} cannot be read as an image ({e})"
            continue
        # Detectron2 turns images upright as it reads them.
        if turned:
            size = size[::-1]
        if size != expected:
            upright = " once upright as its EXIF says" if turned else ""
            yield f"{name!r} is {size[0]}x{size[1]}{upright}, not {expected[0]}x{expected[1]}"


def _is_turned(picture: Image.Image) -> bool:
    # Without the test, getexif() decodes the whole of a PNG in search of a late EXIF chunk.
    if "exif" not in picture.info:
        return False
    try:
        return picture.getexif().get(_EXIF_ORIENTATION) in _EXIF_QUARTER_TURNS
    except Exception:  # damaged EXIF, which Detectron2 ignores too
        return False


def _repeated(values: Iterable[Any]) -> List[Any]:
    return [value for value, times in Counter(values).items() if times > 1]
