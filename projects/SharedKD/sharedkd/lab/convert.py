"""Writes COCO json from a YOLO data set or from Pascal VOC's xml files; images stay where they are.

The libraries supervision, pylabel and fiftyone convert both, too, but need more than this task: supervision
replaces the headless OpenCV used here, pylabel needs pandas and scikit-learn, fiftyone a database.
"""

import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

import yaml
from PIL import Image

from sharedkd.data.images import upright_size
from sharedkd.errors import ConfigError

__all__ = ["convert_voc", "convert_yolo"]

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "test": "test"}

_Written = Dict[str, Tuple[Path, Path]]  #: split -> (json, folder of the images)


class _Object(NamedTuple):
    name: str
    box: Sequence[float]  # x0, y0, x1, y1 in pixels
    polygon: Sequence[float] = ()
    crowd: int = 0


class _Labelled(NamedTuple):
    """An image with its objects."""

    file: str
    width: int
    height: int
    objects: List[_Object]


def _refuse(path: Path, problem: str, fix: str) -> NoReturn:
    raise ConfigError("SOURCE", path, problem, fix)


def _write(path: Path, names: Sequence[str], labelled: Sequence[_Labelled]) -> None:
    """Write COCO json to ``path``; classes have the order of ``names``."""
    images: List[Dict[str, Any]] = []
    rows: List[Dict[str, Any]] = []
    ids = {name: i for i, name in enumerate(names, 1)}
    for number, (file, width, height, objects) in enumerate(labelled, 1):
        images.append({"id": number, "file_name": file, "width": width, "height": height})
        for name, box, polygon, crowd in objects:
            x0, y0, x1, y1 = (round(x, 2) for x in box)
            sides = round(x1 - x0, 2), round(y1 - y0, 2)
            row: Dict[str, Any] = {"id": len(rows) + 1, "image_id": number, "iscrowd": crowd}
            row.update(category_id=ids[name], bbox=[x0, y0, *sides], area=sides[0] * sides[1])
            if polygon:
                xs, ys = polygon[::2], polygon[1::2]
                turns = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]])
                row["area"] = abs(sum(a * d - c * b for a, b, c, d in turns)) / 2
                row["segmentation"] = [[round(x, 2) for x in polygon]]
            rows.append(row)
    categories = [{"id": i, "name": str(name)} for name, i in ids.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {"images": images, "annotations": rows, "categories": categories}
    path.write_text(json.dumps({"info": {}, **lists}))
    print(f"{path}: {len(images)} images, {len(rows)} objects")


# --- YOLO ----------------------------------------------------------------------------------------


def convert_yolo(source: Path, out: Path) -> _Written:
    """Convert a data.yaml, or the one in a folder.  Returns split -> (json, folder of the images)."""
    if source.is_dir():
        found = [source / n for n in ("data.yaml", "data.yml", "dataset.yaml")]
        source = next((x for x in found if x.is_file()), found[0])
    try:
        data = yaml.safe_load(source.read_text(encoding="utf-8"))
        names = data["names"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as e:
        _refuse(source, f"is no YOLO data.yaml ({e})", "name the one with train, val and names")
    pairs = enumerate(names) if isinstance(names, list) else names.items()
    names = {int(i): name for i, name in sorted(pairs, key=lambda pair: int(pair[0]))}
    if len(set(names.values())) < len(names):
        _refuse(source, f"two classes have one name: {names}", "rename one")
    written = {}
    if data.get("val") and data.get("valid"):
        _refuse(source, "names both val and valid", "leave one out")
    for key, split in SPLITS.items():
        named = data.get(key) or []
        folders = [named] if isinstance(named, str) else named
        images = [x for folder in folders for x in _images(source, data.get("path"), folder)]
        if images:
            root = Path(os.path.commonpath([x.parent for x in images]))
            poses = bool(data.get("kpt_shape"))
            path = out / f"{split}.json"
            _write(path, list(names.values()), [_yolo(x, root, names, poses) for x in images])
            written[split] = path, root
    if not written:
        _refuse(source, "names neither train nor val", "write the folders of its images into it")
    return written


def _images(source: Path, base: Optional[str], named: str) -> List[Path]:
    """The images of a folder, or of a text file that lists them, as YOLO finds them."""
    here = source.parent
    places = [here / (base or "") / named, here / named, here / str(named).removeprefix("../")]
    place = next((x.resolve() for x in places if x.exists()), None)
    if place is None:
        _refuse(source, f"names {named}, which is not there", "correct its path, train or val")
    if place.is_file():
        lines = [x.strip() for x in place.read_text(encoding="utf-8").splitlines()]
        files = [(place.parent / x).resolve() for x in lines if x]
    else:
        files = sorted(x for x in place.rglob("*") if x.suffix.lower() in SUFFIXES)
    if not files:
        _refuse(place, "holds no image", "name a folder of images")
    return files


def _yolo(image: Path, root: Path, names: Dict[int, str], poses: bool) -> _Labelled:
    """An image with its labels; those of ``poses`` have keypoints after the box, which are left out."""
    with Image.open(image) as picture:
        width, height = upright_size(picture)
    # The last folder called images has its labels beside it.
    before, found, after = str(image.with_suffix(".txt")).rpartition(f"{os.sep}images{os.sep}")
    labels = Path(f"{before}{os.sep}labels{os.sep}{after}") if found else image.with_suffix(".txt")
    lines = labels.read_text(encoding="utf-8").splitlines() if labels.is_file() else []
    objects = []
    for number, line in enumerate(filter(str.strip, lines), 1):
        try:
            kind, *words = line.split()
            name, numbers = names[int(float(kind))], [float(x) for x in words]
            numbers = numbers[:4] if poses else numbers
            if len(numbers) < 4 or (len(numbers) > 5 and len(numbers) % 2):
                raise ValueError(f"{len(numbers)} numbers")
        except (ValueError, KeyError) as e:
            problem = f"line {number} is no box or polygon of a class of data.yaml ({e})"
            _refuse(labels, problem, "correct it")
        if len(numbers) in (4, 5):  # a fifth one is a score
            x, y, w, h = numbers[:4]
            left, right = (x - w / 2) * width, (x + w / 2) * width
            objects.append(_Object(name, (left, (y - h / 2) * height, right, (y + h / 2) * height)))
        else:
            xs, ys = [x * width for x in numbers[::2]], [y * height for y in numbers[1::2]]
            polygon = [c for point in zip(xs, ys) for c in point]
            objects.append(_Object(name, (min(xs), min(ys), max(xs), max(ys)), polygon))
    return _Labelled(str(image.relative_to(root)), width, height, objects)


# --- Pascal VOC -----------------------------------------------------------------------------------


def convert_voc(source: Path, out: Path) -> _Written:
    """Convert a folder of xml files, or VOC's own folders.  Returns split -> (json, folder of the images)."""
    folder = source / "Annotations" if (source / "Annotations").is_dir() else source
    files = {_stem(x, folder): x for x in sorted(folder.rglob("*.xml"))}
    if not files:
        _refuse(source, "holds no xml file", "name the folder with Annotations, or with the files")
    root = source / "JPEGImages" if (source / "JPEGImages").is_dir() else source
    there: Dict[str, List[Path]] = {}  # by place and name, and by name alone
    for x in sorted(root.rglob("*")):
        if x.suffix.lower() in SUFFIXES:
            for name in {_stem(x, root), x.stem}:
                there.setdefault(name, []).append(x)
    parsed = {stem: _voc(path) for stem, path in files.items()}
    names = sorted({x.name for image in parsed.values() for x in image.objects})
    if not names:
        _refuse(source, "no xml file has an object", "name another folder")
    written = {}
    for split, stems in _voc_splits(source, files).items():
        labelled = [_beside(parsed[stem], stem, files[stem], root, there) for stem in stems]
        _write(out / f"{split}.json", names, labelled)
        written[split] = out / f"{split}.json", root
    return written


def _stem(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder).with_suffix(""))


def _beside(
    parsed: _Labelled, stem: str, xml: Path, root: Path, there: Dict[str, List[Path]]
) -> _Labelled:
    """The labels of a file with its image below ``root``, and that one's size if they have none."""
    named = Path(parsed.file.replace("\\", "/")).stem
    tried = (stem, str(Path(stem).parent / named), Path(stem).name, named)
    found = next((there[name] for name in tried if name in there), [])
    if len(found) != 1:
        problem = f"{len(found) or 'no'} images {parsed.file} below {root}"
        _refuse(xml, problem, "put one there, in the folder of its xml")
    size = parsed.width, parsed.height
    if not all(size):
        with Image.open(found[0]) as picture:
            size = upright_size(picture)
    return _Labelled(str(found[0].relative_to(root)), *size, parsed.objects)


def _voc_splits(source: Path, files: Dict[str, Path]) -> Dict[str, List[str]]:
    """split -> stems: of the lists of ImageSets/Main, or of folders train, valid, test, or of all."""
    splits: Dict[str, List[str]] = {}
    for path in (source / "ImageSets/Main" / f"{split}.txt" for split in SPLITS):
        if path.is_file():
            stems = [x.split()[0] for x in path.read_text().splitlines() if x.strip()]
            splits.setdefault(SPLITS[path.stem], []).extend(x for x in stems if x in files)
            lost = [x for x in stems if x not in files]
            if lost:
                print(
                    f"{path}: {len(lost)} of {len(stems)} have no xml and are left out ({lost[0]})"
                )
    if not splits:
        for stem, path in files.items():
            split = SPLITS.get(path.relative_to(source).parts[0], "all")
            splits.setdefault(split, []).append(stem)
    return splits


def _voc(path: Path) -> _Labelled:
    """The labels of an xml file; VOC counts pixels from 1."""
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (int(float(root.findtext(f"size/{x}") or 0)) for x in ("width", "height"))
        objects = []
        for x in root.iter("object"):
            sides = ("xmin", "ymin", "xmax", "ymax")
            x0, y0, x1, y1 = (float(x.findtext(f"bndbox/{side}") or "") for side in sides)
            # VOC leaves difficult objects out of evaluation, as COCO does with crowd regions.
            crowd = int(x.findtext("difficult") == "1")
            name = (x.findtext("name") or "").strip()
            objects.append(_Object(name, (x0 - 1, y0 - 1, x1, y1), crowd=crowd))
    except (ElementTree.ParseError, TypeError, ValueError, AttributeError) as e:
        _refuse(path, f"is no VOC annotation ({e})", "correct or remove it")
    return _Labelled(root.findtext("filename") or path.stem, width, height, objects)
