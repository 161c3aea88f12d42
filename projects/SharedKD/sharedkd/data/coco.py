"""Own data in COCO format: read, repaired in memory, checked against their images, and registered.

The files on disk are never changed.  Detectron2 reads a clean file itself; of repaired or several
files it reads a copy in a temporary folder, in training and evaluation alike.
"""

import json
import os
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json

from sharedkd.errors import ConfigError

from .images import check_headers, is_thin, match_files
from .notes import COPIES, NO_CLASS, SAME_CLASSES, SAME_FILE, Notes, Reading
from .repair import is_root, read_json, settle_annotations, settle_categories, settle_images

__all__ = [
    "PSEUDO",
    "CocoData",
    "CocoSummary",
    "read_classes",
    "read_coco",
    "read_registered",
]

_MANY_CROWDS, _MANY_EMPTY = 0.1, 0.5  # shares of objects and of images that are warned of
PSEUDO = "pseudo_labels"  #: true in `info` of a json by a teacher, and in the dataset dicts of its images


@dataclass(frozen=True)
class CocoSummary:
    """What one json file holds, after repairs.

    Args:
        key: the config key that names the file.
        json_file: the file.
        images, objects: their numbers; crowd regions are no objects.
        crowds: number of crowd regions (``iscrowd`` 1).
        empty_images: number of images without an object.
        repaired: number of repairs.
        unmasked: number of objects without a segmentation; for evaluation also of crowd regions.
        categories: category id -> class name, ids ascending.
        repairs: what was repaired, a line for each kind.
        refused: whether the file cannot be used.
    """

    key: str
    json_file: str
    images: int
    objects: int
    crowds: int
    empty_images: int
    repaired: int
    unmasked: int
    categories: Dict[int, str]
    repairs: Tuple[str, ...]
    refused: bool

    @property
    def classes(self) -> List[str]:
        """Class names in order of category id: the order of Detectron2's contiguous class ids."""
        return list(self.categories.values())

    @property
    def has_masks(self) -> bool:
        """Whether every object has a segmentation, as training on masks or their evaluation needs."""
        return self.unmasked == 0


@dataclass
class CocoData:
    """One or several json files, read as one data set.

    Args:
        files: a summary of each that could be read, also of those that are refused.
        categories: category id -> class name of all of them, ids ascending.
        errors: why they are refused, all at once.
        warnings: what was repaired and what is probably not meant.
        json_file, image_root: the file, and the folder that its file names are relative to.
        document: what Detectron2 is to read in place of the file; None: the file is clean.
        image_files: absolute names of the images.
        pseudo_files: those of them whose labels are all a teacher's.
    """

    files: List[CocoSummary] = field(default_factory=list)
    categories: Dict[int, str] = field(default_factory=dict)
    errors: List[ConfigError] = field(default_factory=list)
    warnings: List[ConfigError] = field(default_factory=list)
    json_file: str = ""
    image_root: str = ""
    document: Optional[Dict[str, Any]] = field(default=None, repr=False)
    image_files: List[str] = field(default_factory=list, repr=False)
    pseudo_files: Set[str] = field(default_factory=set, repr=False)

    @property
    def classes(self) -> List[str]:
        """Class names in order of category id."""
        return list(self.categories.values())

    def refuse(self, errors: Sequence[ConfigError]) -> None:
        """Add to the reasons not to use the data; with any, all their files are refused."""
        self.errors += errors
        self.files = [replace(x, refused=bool(self.errors)) for x in self.files]

    def register(self, name: str) -> None:
        """Make ``name`` a Detectron2 data set; one of that name is replaced.

        Class names and the map of category ids are there at once, before the data are first loaded.
        """
        json_file = self.json_file
        if self.document is not None:
            json_file = os.path.join(_folder().name, f"{name}.json")
            with open(json_file, "w", encoding="utf-8") as f:
                json.dump(self.document, f)
            self.json_file, self.document = json_file, None
        others = MetadataCatalog.get(name).as_dict()
        metadata = {
            **{k: v for k, v in others.items() if k not in ("name", "evaluator_type")},
            "evaluator_type": others.get("evaluator_type", "coco"),
            "json_file": json_file,
            "image_root": self.image_root,
            "thing_classes": self.classes,
            "thing_dataset_id_to_contiguous_id": {c: i for i, c in enumerate(self.categories)},
        }
        # Metadata refuse to change their values, so those of another data set must go first.
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog:
                catalog.remove(name)
        load = partial(load_coco_json, json_file, self.image_root, name)
        if self.pseudo_files:
            load = partial(_marked, load, self.pseudo_files)
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**metadata)


def _marked(load: Callable[[], List[Dict[str, Any]]], files: Set[str]) -> List[Dict[str, Any]]:
    """Dataset dicts, those of ``files`` with :data:`PSEUDO`."""
    records = load()
    for x in records:
        if os.path.abspath(x["file_name"]) in files:
            x[PSEUDO] = True
    return records


@lru_cache(maxsize=None)
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="sharedkd_")  # removed as the process ends


# --- reading ----------------------------------------------------------------------------------------


def read_coco(
    json_files: Sequence[str],
    image_roots: Sequence[str],
    key: str,
    images_key: str,
    *,
    train: bool = True,
    classes: Optional[Mapping[int, str]] = None,
    reading: Reading = Reading(),
) -> CocoData:
    """Read COCO json files as one data set, with all that is wrong or was repaired.

    Args:
        json_files: the annotations.
        image_roots: for each, the folder that the images' ``file_name`` are relative to.
        key, images_key: the config keys that hold the two, for messages.
        train: True asks for at least one object, and for objects of each class that has crowd regions.
        classes: category id -> name that the classes of the files are matched with; None: their own.
        reading: how the run reads them.
    """
    data = CocoData(json_file=json_files[0], image_root=image_roots[0])
    files = [_File(f, root, key, images_key, reading) for f, root in zip(json_files, image_roots)]
    readable = [f for f in files if f.document is not None]
    if len(files) > 1:
        _keep_ids_apart(readable)
    data.categories = _match_classes(readable, classes)
    by_file: Dict[str, Dict[str, Any]] = {}
    for f in readable:
        f.settle(data.categories, by_file)
    _drop_copies(readable)
    data.image_files = list(by_file)
    for f in readable:
        data.pseudo_files |= f.paths if f.is_pseudo else set()
    for f in readable:
        data.pseudo_files -= set() if f.is_pseudo else f.paths
    data.files = [f.summary(train, data.categories) for f in readable]
    data.refuse([error for f in files for error in f.notes.errors])
    data.warnings = [warning for f in readable for warning in f.notes.warnings]
    for f in files:
        data.warnings += f.notes.repair_warnings
    if not data.errors:
        _judge(data, readable, train)
        if len(files) > 1 or data.files[0].repairs:
            data.document = _merge(readable, data.categories)
    return data


class _File:
    """A json file while it is read."""

    def __init__(self, json_file: str, root: str, key: str, images_key: str, reading: Reading):
        self.root, self.images_key = root, images_key
        self.notes = Notes(key, json_file, reading)
        self.document = read_json(self.notes)
        self.images: List[Dict[str, Any]] = []
        self.objects: Counter = Counter()  # by category id
        self.crowds: Counter = Counter()
        self.united: Set[int] = set()  # ids of images that were listed twice
        self.paths: Set[str] = set()  # absolute names of its images
        if self.document is not None:
            self._images = settle_images(self.document, self.notes)
            self.categories = settle_categories(self.document, self.notes)
            self.images = self.document["images"]

    @property
    def is_pseudo(self) -> bool:
        info = self.document.get("info")
        return isinstance(info, dict) and info.get(PSEUDO) is True

    def settle(self, classes: Mapping[int, str], by_file: Dict[str, Dict[str, Any]]) -> None:
        """Match images with their files, then annotations with images and classes.

        Args:
            classes: id -> name.
            by_file: absolute name -> image, of the files before; gets those of this one.
        """
        sound = [i for i in self.images if i["sound"]]
        place = self.root, self.images_key, self.notes
        check_headers(match_files(sound, *place), *place)
        for image in sound:
            image["sound"] = image["width"] is not None
        for image in sound:
            self._check_thin(image)
        self._unite(by_file)
        ids = {name: i for i, name in classes.items()}
        known = {k: ids.get(row["name"], row["id"]) for k, row in self.categories.items()}
        settle_annotations(self.document, self._images, known, self.notes)

    def _check_thin(self, image: Dict[str, Any]) -> None:
        most = self.notes.reading.max_size
        if is_thin(image["width"] or 1, image["height"] or 1, most):
            self.notes.refuse(
                f"image {image['file_name']!r} of {image['width']}x{image['height']} pixels has no side "
                f"left once its longer one is {most} (data.max_size)",
                "crop it or cut it into pieces, or remove it from the json",
            )

    def _unite(self, by_file: Dict[str, Dict[str, Any]]) -> None:
        """Make one image of those that name the same file."""
        for key, image in self._images.items():
            if image["sound"]:
                path = os.path.abspath(os.path.join(self.root, image["file_name"]))
                self.paths.add(path)
                first = by_file.setdefault(path, image)
                if first is not image:
                    self.notes.repair(SAME_FILE, repr(image["file_name"]))
                    self._images[key], image["sound"] = first, None
                    self.united.add(first["id"])
        self.images = [image for image in self.images if image["sound"] is not None]

    def summary(self, train: bool, classes: Mapping[int, str]) -> CocoSummary:
        annotations = self.document["annotations"]
        objects = [a for a in annotations if a["iscrowd"] != 1]
        self.objects = Counter(a["category_id"] for a in objects)
        self.crowds = Counter(a["category_id"] for a in annotations if a["iscrowd"] == 1)
        occupied = {a["image_id"] for a in objects} & {i["id"] for i in self.images}
        return CocoSummary(
            key=self.notes.key,
            json_file=self.notes.json_file,
            images=len(self.images),
            objects=len(objects),
            crowds=len(annotations) - len(objects),
            empty_images=len(self.images) - len(occupied),
            repaired=self.notes.repaired,
            # Mask evaluation reads those of crowd regions, too; training leaves the regions out.
            unmasked=sum(not a.get("segmentation") for a in (objects if train else annotations)),
            categories=dict(classes),
            repairs=self.notes.repairs,
            refused=False,
        )


def _keep_ids_apart(files: Sequence[_File]) -> None:
    images = [image for f in files for image in f.images]
    for i, image in enumerate(images):
        image["id"] = i + 1


def _drop_copies(files: Sequence[_File]) -> None:
    """Leave out second copies of the objects of an image that was listed twice."""
    united, seen = set().union(*(f.united for f in files)), set()
    for f in files if united else []:
        kept = []
        for a in f.document["annotations"]:
            copy = (a["image_id"], a["category_id"], a["iscrowd"] == 1, *a["bbox"])
            if a["image_id"] in united and copy in seen:
                f.notes.repair(COPIES, f"annotation id {a['id']}")
            else:
                kept.append(a)
            seen.add(copy)
        f.document["annotations"] = kept


def _match_classes(files: Sequence[_File], given: Optional[Mapping[int, str]]) -> Dict[int, str]:
    """Settle which classes the files have, by name, and leave out categories that stand for none.

    Args:
        given: id -> name of training, for files to evaluate on.

    Returns:
        id -> name, ids ascending.
    """
    rows = [row for f in files for row in f.categories.values()]
    used = {row["name"] for row in rows if row["used"]}
    own: Dict[int, str] = dict(given or {})
    for f in files:
        mine = list(f.categories.values())
        for row in mine:
            name = row["name"]
            if name is None or name in own.values():
                continue
            if name not in used and (given or (is_root(row, mine) and used)):
                f.notes.repair(NO_CLASS, f"id {row['id']}, {name!r}")
            elif given:
                absent = [x for x in given.values() if x not in {r["name"] for r in rows}]
                f.notes.refuse(
                    f"has {row['used']} objects of {name!r}, which is no class of training"
                    + f"; {', '.join(map(repr, absent[:5]))} of training is not listed"
                    * bool(absent),
                    "write the same list of categories into both files",
                )
            else:
                own[row["id"] if row["id"] not in own else max(own) + 1] = name
    own = dict(sorted(own.items()))
    for f in files:
        listed = {
            row["id"]: row["name"] for row in f.categories.values() if row["name"] in own.values()
        }
        for i, name in own.items():
            if listed.get(i) != name and (len(files) == 1 or name in listed.values()):
                f.notes.repair(SAME_CLASSES, f"{name!r} has id {i}")
    return own


def _judge(data: CocoData, files: Sequence[_File], train: bool) -> None:
    """Refuse data that are in order and that nothing could be learnt from; warn of what is hardly meant."""
    say = partial(ConfigError, files[0].notes.key, ", ".join(f.notes.json_file for f in files))
    objects, crowds = (
        sum((f.objects for f in files), Counter()),
        sum((f.crowds for f in files), Counter()),
    )
    some, many = sum(objects.values()), sum(crowds.values())
    empty, images = (sum(getattr(f, n) for f in data.files) for n in ("empty_images", "images"))
    absent = [name for i, name in data.categories.items() if not objects[i]]
    lost = [name for i, name in data.categories.items() if crowds[i] and not objects[i]]
    what = "not trained on" if train else "ignored in evaluation"
    if train and lost:
        problem = (
            f"all annotations of {_listed(lost)} are crowd regions (iscrowd 1), which are {what}"
        )
        data.refuse([say(problem, "set iscrowd to 0 if they are objects")])
        return
    if train and not some:
        data.refuse([say("no image has an object", "annotate some objects")])
        return
    if many > _MANY_CROWDS * (some + many):
        problem = (
            f"{many} of {some + many} annotations are crowd regions (iscrowd 1), which are {what}"
        )
        fix = "set iscrowd to 0 if they are objects, as brush tools mark all of theirs"
        data.warnings.append(say(problem, fix))
    if train and empty > _MANY_EMPTY * images:
        problem = f"{empty} of {images} images have no object and are trained on as background"
        fix = "remove them from the json if they are only not annotated yet"
        data.warnings.append(say(problem, fix))
    if not some:
        data.warnings.append(
            say("has no object to find: every AP will be nan", "name a json with objects")
        )
    elif absent:
        what = "its scores are never trained" if train else "its AP is nan and left out of the mean"
        problem = f"{len(absent)} of {len(data.categories)} classes have no object here ({_listed(absent)})"
        data.warnings.append(say(f"{problem}: {what}", "remove the class if nothing is of it"))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + ", ..." * (len(names) > 5)


def _merge(files: Sequence[_File], categories: Mapping[int, str]) -> Dict[str, Any]:
    """One document of what is left of the files."""
    several = len(files) > 1
    rows = {row["name"]: row for f in files for row in f.categories.values()}
    for row in rows.values():
        del row["used"]
    merged: Dict[str, Any] = {
        "info": files[0].document.get("info", {}),
        "images": [],
        "annotations": [],
        "categories": [
            {**rows.get(name, {}), "id": i, "name": name} for i, name in categories.items()
        ],
    }
    for f in files:
        for image in f.images:
            del image["sound"]
            if several:
                image["file_name"] = os.path.abspath(os.path.join(f.root, image["file_name"]))
        merged["images"] += f.images
        merged["annotations"] += f.document["annotations"]
    if several:
        for i, a in enumerate(merged["annotations"]):
            a["id"] = i + 1
    return merged


# --- shorter ways in --------------------------------------------------------------------------------


def read_classes(json_files: Sequence[str]) -> List[str]:
    """The class names of json files, in order of category id, without their images; empty if unreadable."""
    files = [_File(f, "", "", "", Reading()) for f in json_files]
    readable = [f for f in files if f.document is not None]
    return list(_match_classes(readable, None).values())


def read_registered(
    name: str, key: str, *, train: bool, reading: Reading = Reading()
) -> Optional[CocoData]:
    """Read the json of a registered data set; None if it has none, or one of another format, such as LVIS's.

    Where Detectron2's own function reads the file, ``name`` becomes the repaired data.  Data of another
    function are left alone, so that anything to repair is refused.
    """
    metadata, function = MetadataCatalog.get(name), DatasetCatalog[name]
    if not metadata.get("json_file") or metadata.get("evaluator_type", "coco") != "coco":
        return None
    ours = getattr(function, "func", function).__module__ == load_coco_json.__module__
    reading = replace(reading, repair=reading.repair and ours)
    files = [os.fspath(metadata.json_file)], [os.fspath(metadata.get("image_root", ""))]
    data = read_coco(*files, key, key, train=train, reading=reading)
    if data.document is not None:
        data.register(name)
    return data
