"""Writes COCO json from a YOLO data set or from Pascal VOC's xml files; images stay where they are.

The libraries supervision, pylabel and fiftyone convert both, too, but need more than this task: supervision
replaces the headless OpenCV used here, pylabel needs pandas and scikit-learn, fiftyone a database.
"""

import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, Dict, Iterable, List, NoReturn, Optional, Sequence, Tuple

import yaml
from PIL import Image

from sharedkd.data.images import upright_size
from sharedkd.errors import ConfigError

__all__ = ["convert_voc", "convert_yolo"]

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def _refuse(path: Path, problem: str, fix: str) -> NoReturn:
    raise ConfigError("SOURCE", path, problem, fix)


class _Coco:
    """Collects the lists of a COCO json."""

    def __init__(self, names: Sequence[str]):
        self.ids = {name: i + 1 for i, name in enumerate(names)}
        self.images: List[Dict[str, Any]] = []
        self.annotations: List[Dict[str, Any]] = []

    def image(self, file_name: str, width: int, height: int) -> None:
        row = {"id": len(self.images) + 1, "file_name": file_name, "width": width, "height": height}
        self.images.append(row)

    def object(
        self, name: str, box: Iterable[float], polygon: Optional[List[float]] = None, crowd: int = 0
    ) -> None:
        """Add an object to the last image; ``box`` is x0, y0, x1, y1 in pixels."""
        x0, y0, x1, y1 = (round(x, 2) for x in box)
        row: Dict[str, Any] = {"id": len(self.annotations) + 1, "image_id": len(self.images)}
        row.update(category_id=self.ids[name], iscrowd=crowd)
        row["bbox"] = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
        row["area"] = row["bbox"][2] * row["bbox"][3]
        if polygon:
            row["segmentation"] = [[round(x, 2) for x in polygon]]
            xs, ys = polygon[::2], polygon[1::2]
            turns = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1])
            row["area"] = abs(sum(a * d - c * b for a, b, c, d in turns)) / 2
        self.annotations.append(row)

    def write(self, path: Path) -> None:
        categories = [{"id": i, "name": str(name)} for name, i in self.ids.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        lists = {"images": self.images, "annotations": self.annotations, "categories": categories}
        path.write_text(json.dumps({"info": {}, **lists}))
        print(f"{path}: {len(self.images)} images, {len(self.annotations)} objects")


# --- YOLO ----------------------------------------------------------------------------------------


_Written = Dict[str, Tuple[Path, Path]]


def convert_yolo(source: Path, out: Path) -> _Written:
    """Convert a data.yaml, or the one in a folder.  Returns split -> (json, folder of the images)."""
    if source.is_dir():
        found = [source / n for n in ("data.yaml", "data.yml", "dataset.yaml")]
        source = next((x for x in found if x.is_file()), source / "data.yaml")
    try:
        data = yaml.safe_load(source.read_text(encoding="utf-8"))
        names = data["names"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as e:
        _refuse(source, f"is no YOLO data.yaml ({e})", "name the one with train, val and names")
    names = (
        dict(enumerate(names)) if isinstance(names, list) else {int(k): v for k, v in names.items()}
    )
    if len(set(names.values())) < len(names):
        _refuse(source, f"two classes have one name: {names}", "rename one")
    written = {}
    for split in ("train", "val", "valid", "test"):
        if data.get(split):
            folders = data[split] if isinstance(data[split], list) else [data[split]]
            coco = _Coco([names[k] for k in sorted(names)])
            images: List[Path] = []
            for folder in folders:
                images += _yolo_images(source, data.get("path"), folder)
            root = Path(os.path.commonpath([x.parent for x in images]))
            for image in images:
                _add_yolo(coco, image, root, names, poses=bool(data.get("kpt_shape")))
            path = out / f"{'val' if split == 'valid' else split}.json"
            coco.write(path)
            written[path.stem] = path, root
    if not written:
        _refuse(source, "names neither train nor val", "write the folders of its images into it")
    return written


def _yolo_images(source: Path, base: Optional[str], named: str) -> List[Path]:
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


def _add_yolo(
    coco: _Coco, image: Path, root: Path, names: Dict[int, str], poses: bool = False
) -> None:
    """Add an image with its labels; those of ``poses`` have keypoints after the box, which are left out."""
    with Image.open(image) as picture:
        width, height = upright_size(picture)
    coco.image(str(image.relative_to(root)), width, height)
    # The last folder called images has its labels beside it.
    before, found, after = str(image.with_suffix(".txt")).rpartition(f"{os.sep}images{os.sep}")
    labels = Path(f"{before}{os.sep}labels{os.sep}{after}") if found else image.with_suffix(".txt")
    lines = labels.read_text(encoding="utf-8").splitlines() if labels.is_file() else []
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
            coco.object(name, (left, (y - h / 2) * height, right, (y + h / 2) * height))
        else:
            xs, ys = [x * width for x in numbers[::2]], [y * height for y in numbers[1::2]]
            polygon = [c for point in zip(xs, ys) for c in point]
            coco.object(name, (min(xs), min(ys), max(xs), max(ys)), polygon)


# --- Pascal VOC -----------------------------------------------------------------------------------


def convert_voc(source: Path, out: Path) -> _Written:
    """Convert a folder of xml files, or VOC's own folders.  Returns split -> (json, folder of the images)."""
    folder = source / "Annotations" if (source / "Annotations").is_dir() else source
    files = {_stem(x, folder): x for x in sorted(folder.rglob("*.xml"))}
    if not files:
        _refuse(source, "holds no xml file", "name the folder with Annotations, or with the files")
    parsed = {stem: _parse_voc(path) for stem, path in files.items()}
    names = sorted({name for _, _, objects in parsed.values() for name, _, _ in objects})
    if not names:
        _refuse(source, "no xml file has an object", "name another folder")
    images = source / "JPEGImages" if (source / "JPEGImages").is_dir() else source
    there: Dict[str, List[Path]] = {}  # by place and name, and by name alone
    for x in sorted(images.rglob("*")):
        if x.suffix.lower() in SUFFIXES:
            for name in {_stem(x, images), x.stem}:
                there.setdefault(name, []).append(x)
    written = {}
    for split, stems in _voc_splits(source, files).items():
        coco = _Coco(names)
        for stem in stems:
            file_name, size, objects = parsed[stem]
            named = Path(file_name.replace("\\", "/")).stem
            tried = (stem, str(Path(stem).parent / named), Path(stem).name, named)
            found = next((there[name] for name in tried if name in there), [])
            if len(found) != 1:
                problem = f"{len(found) or 'no'} images {file_name} below {images}"
                _refuse(files[stem], problem, "put one there, in the folder of its xml")
            image = found[0]
            if not all(size):
                with Image.open(image) as picture:
                    size = picture.size
            coco.image(str(image.relative_to(images)), *size)
            for name, box, difficult in objects:
                # VOC leaves difficult objects out of evaluation, as COCO does with crowd regions.
                coco.object(name, box, crowd=int(difficult))
        coco.write(out / f"{split}.json")
        written[split] = out / f"{split}.json", images
    return written


def _stem(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder).with_suffix(""))


def _voc_splits(source: Path, files: Dict[str, Path]) -> Dict[str, List[str]]:
    """split -> stems: of the lists of ImageSets/Main, or of folders train, valid, test, or of all."""
    splits: Dict[str, List[str]] = {}
    for split in ("train", "val", "test"):
        path = source / "ImageSets" / "Main" / f"{split}.txt"
        if path.is_file():
            stems = [x.split()[0] for x in path.read_text().splitlines() if x.strip()]
            splits[split] = [x for x in stems if x in files]
    if not splits:
        for stem, path in files.items():
            first = path.relative_to(source).parts[0]
            name = {"train": "train", "val": "val", "valid": "val", "test": "test"}.get(
                first, "all"
            )
            splits.setdefault(name, []).append(stem)
    return splits


_SIDES = ("xmin", "ymin", "xmax", "ymax")
_Object = Tuple[str, Tuple[float, ...], bool]


def _parse_voc(path: Path) -> Tuple[str, Tuple[int, ...], List[_Object]]:
    """(file name, (width, height), [(class, box, difficult)]); VOC counts pixels from 1."""
    try:
        root = ElementTree.parse(path).getroot()
        size = tuple(int(float(root.findtext(f"size/{x}") or 0)) for x in ("width", "height"))
        objects: List[_Object] = []
        for x in root.iter("object"):
            x0, y0, x1, y1 = (float(x.findtext(f"bndbox/{side}") or "") for side in _SIDES)
            name = (x.findtext("name") or "").strip()
            objects.append((name, (x0 - 1, y0 - 1, x1, y1), x.findtext("difficult") == "1"))
    except (ElementTree.ParseError, TypeError, ValueError, AttributeError) as e:
        _refuse(path, f"is no VOC annotation ({e})", "correct or remove it")
    return root.findtext("filename") or path.stem, size, objects
