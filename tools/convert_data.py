#!/usr/bin/env python
"""Write COCO json from a YOLO data set or from Pascal VOC's xml files; images stay where they are.

    tools/convert_data.py yolo data.yaml OUT      # OUT/train.json, OUT/val.json, ...
    tools/convert_data.py voc FOLDER OUT          # one json, or one for each list of ImageSets/Main

It prints the overrides to train with.  Of YOLO, boxes and polygons are converted; of VOC boxes.
supervision, pylabel and fiftyone convert both, too: the first needs opencv-python, which replaces the
headless build that is used here, pylabel needs pandas and scikit-learn, fiftyone a database.
"""

import argparse
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import prologue  # noqa: F401
import yaml
from PIL import Image

from sharedkd.data.images import upright_size
from sharedkd.errors import ConfigError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def refuse(path, problem, fix):
    raise ConfigError("SOURCE", path, problem, fix)


class Coco:
    """The lists of a COCO json while they grow."""

    def __init__(self, names):
        self.ids = {name: i + 1 for i, name in enumerate(names)}
        self.images, self.annotations = [], []

    def image(self, file_name, width, height):
        row = {"id": len(self.images) + 1, "file_name": file_name, "width": width, "height": height}
        self.images.append(row)

    def object(self, name, box, polygon=None, **more):
        """``box`` as x0, y0, x1, y1 in pixels; of the last image."""
        x0, y0, x1, y1 = (round(x, 2) for x in box)
        row = {"id": len(self.annotations) + 1, "image_id": len(self.images), "iscrowd": 0}
        row.update(category_id=self.ids[name], bbox=[x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)])
        row["area"] = row["bbox"][2] * row["bbox"][3]
        if polygon:
            row["segmentation"] = [[round(x, 2) for x in polygon]]
            xs, ys = polygon[::2], polygon[1::2]
            turns = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1])
            row["area"] = abs(sum(a * d - c * b for a, b, c, d in turns)) / 2
        self.annotations.append({**row, **more})

    def write(self, path):
        categories = [{"id": i, "name": str(name)} for name, i in self.ids.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        lists = {"images": self.images, "annotations": self.annotations, "categories": categories}
        path.write_text(json.dumps({"info": {}, **lists}))
        print(f"{path}: {len(self.images)} images, {len(self.annotations)} objects")


# --- YOLO ----------------------------------------------------------------------------------------


def convert_yolo(source, out):
    """{split: (json, folder)} of a data.yaml, or of the folder that it lies in."""
    if source.is_dir():
        found = [source / n for n in ("data.yaml", "data.yml", "dataset.yaml")]
        source = next((x for x in found if x.is_file()), source / "data.yaml")
    try:
        data = yaml.safe_load(source.read_text(encoding="utf-8"))
        names = data["names"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as e:
        refuse(source, f"is no YOLO data.yaml ({e})", "name the one with train, val and names")
    names = (
        dict(enumerate(names)) if isinstance(names, list) else {int(k): v for k, v in names.items()}
    )
    if len(set(names.values())) < len(names):
        refuse(source, f"two classes have one name: {names}", "rename one")
    written = {}
    for split in ("train", "val", "valid", "test"):
        if data.get(split):
            folders = data[split] if isinstance(data[split], list) else [data[split]]
            coco, images = Coco([names[k] for k in sorted(names)]), []
            for folder in folders:
                images += yolo_images(source, data.get("path"), folder)
            root = Path(os.path.commonpath([x.parent for x in images]))
            for image in images:
                add_yolo(coco, image, root, names)
            path = out / f"{'val' if split == 'valid' else split}.json"
            coco.write(path)
            written[path.stem] = path, root
    if not written:
        refuse(source, "names neither train nor val", "write the folders of its images into it")
    return written


def yolo_images(source, base, named):
    """The images of a folder, or of a text file that lists them, as YOLO finds them."""
    here = source.parent
    places = [here / (base or "") / named, here / named, here / str(named).removeprefix("../")]
    place = next((x.resolve() for x in places if x.exists()), None)
    if place is None:
        refuse(source, f"names {named}, which is not there", "correct its path, train or val")
    if place.is_file():
        lines = [x.strip() for x in place.read_text(encoding="utf-8").splitlines()]
        files = [(place.parent / x).resolve() for x in lines if x]
    else:
        files = sorted(x for x in place.rglob("*") if x.suffix.lower() in SUFFIXES)
    if not files:
        refuse(place, "holds no image", "name a folder of images")
    return files


def add_yolo(coco, image, root, names):
    with Image.open(image) as picture:
        width, height = upright_size(picture)
    coco.image(str(image.relative_to(root)), width, height)
    # The last folder called images has its labels beside it.
    before, found, after = str(image.with_suffix(".txt")).rpartition(f"{os.sep}images{os.sep}")
    labels = Path(f"{before}{os.sep}labels{os.sep}{after}") if found else image.with_suffix(".txt")
    lines = labels.read_text(encoding="utf-8").splitlines() if labels.is_file() else []
    for number, line in enumerate(filter(str.strip, lines), 1):
        try:
            kind, *numbers = line.split()
            name, numbers = names[int(float(kind))], [float(x) for x in numbers]
            if len(numbers) < 4 or (len(numbers) > 5 and len(numbers) % 2):
                raise ValueError(f"{len(numbers)} numbers")
        except (ValueError, KeyError) as e:
            refuse(
                labels,
                f"line {number} is no box or polygon of a class of data.yaml ({e})",
                "correct it",
            )
        if len(numbers) in (4, 5):  # a fifth one is a score
            x, y, w, h = numbers[:4]
            box = (
                (x - w / 2) * width,
                (y - h / 2) * height,
                (x + w / 2) * width,
                (y + h / 2) * height,
            )
            coco.object(name, box)
        else:
            xs, ys = [x * width for x in numbers[::2]], [y * height for y in numbers[1::2]]
            polygon = [c for point in zip(xs, ys) for c in point]
            coco.object(name, (min(xs), min(ys), max(xs), max(ys)), polygon)


# --- Pascal VOC -----------------------------------------------------------------------------------


def convert_voc(source, out):
    """{split: (json, folder)} of a folder with xml files, or with VOC's own folders."""
    folder = source / "Annotations" if (source / "Annotations").is_dir() else source
    files = {x.stem: x for x in sorted(folder.rglob("*.xml"))}
    if not files:
        refuse(
            source, "holds no xml file", "name the folder that holds Annotations, or the xml files"
        )
    parsed = {stem: parse_voc(path) for stem, path in files.items()}
    names = sorted({name for _, _, objects in parsed.values() for name, _, _ in objects})
    if not names:
        refuse(source, "no xml file has an object", "name another folder")
    images = source / "JPEGImages" if (source / "JPEGImages").is_dir() else source
    there = {x.stem: x for x in sorted(images.rglob("*")) if x.suffix.lower() in SUFFIXES}
    written = {}
    for split, stems in voc_splits(source, files).items():
        coco = Coco(names)
        for stem in stems:
            file_name, size, objects = parsed[stem]
            image = there.get(stem) or there.get(Path(file_name.replace("\\", "/")).stem)
            if image is None:
                refuse(files[stem], f"no image {file_name} below {images}", "put the image there")
            if not all(size):
                with Image.open(image) as picture:
                    size = picture.size
            coco.image(str(image.relative_to(images)), *size)
            for name, box, difficult in objects:
                # VOC leaves difficult objects out of evaluation, as COCO does with crowd regions.
                coco.object(name, box, **({"iscrowd": 1} if difficult else {}))
        coco.write(out / f"{split}.json")
        written[split] = out / f"{split}.json", images
    return written


def voc_splits(source, files):
    """{split: stems}, of the lists train and val if there are such, else one of all."""
    splits = {}
    for split in ("train", "val", "test"):
        path = source / "ImageSets" / "Main" / f"{split}.txt"
        if path.is_file():
            stems = [x.split()[0] for x in path.read_text().splitlines() if x.strip()]
            splits[split] = [x for x in stems if x in files]
    return splits or {"all": list(files)}


def parse_voc(path):
    """(file name, (width, height), [(class, box, difficult)]); VOC counts pixels from 1."""
    try:
        root = ElementTree.parse(path).getroot()
        size = tuple(int(float(root.findtext(f"size/{x}") or 0)) for x in ("width", "height"))
        objects = []
        for x in root.iter("object"):
            box = [float(x.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            box = box[0] - 1, box[1] - 1, box[2], box[3]
            objects.append((x.findtext("name").strip(), box, x.findtext("difficult") == "1"))
    except (ElementTree.ParseError, TypeError, ValueError, AttributeError) as e:
        refuse(path, f"is no VOC annotation ({e})", "correct or remove it")
    return root.findtext("filename") or path.stem, size, objects


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("format", choices=["yolo", "voc"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    try:
        written = {"yolo": convert_yolo, "voc": convert_voc}[args.format](args.source, args.out)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    for split, (path, folder) in written.items():
        if split in ("train", "val"):
            print(f"data.{split}_json={path} data.{split}_images={folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
