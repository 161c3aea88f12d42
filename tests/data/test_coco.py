"""What is repaired in a COCO json, what is refused, and what a run then sees."""

import json
import os
import re
import unicodedata
from pathlib import Path

import pytest
from coco_files import (
    GOOD,
    HEIGHT,
    NAME,
    WIDTH,
    all_of,
    annotation,
    extend,
    image,
    raise_errors,
    reading_of,
    rle,
    seen,
    setter,
)
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from sharedkd.data.coco import read_classes, read_coco, read_registered
from sharedkd.data.notes import Reading
from sharedkd.errors import ConfigError

KEYS = ("data.train_json", "data.train_images")
BOXES = Reading(masks=False)

A, SUB, MANY, EMPTY = "a.png", "sub/ünï 図.jpg", "many.png", "empty.png"
CAT, ROAD = ("cat", [5, 5, 20, 10], False, True), ("straße", [5.5, 5, 20, 10], False, True)
SMALL = [("straße", [5 * i, 9, 4, 8], False, True) for i in range(8)]
CLEAN = {
    A: [CAT, ROAD],
    SUB: [("cat", [-0.4, 30, 60.8, 10.9], False, True), ("cat", [0, 0, 60, 40], True, True)],
    MANY: SMALL,
    EMPTY: [],
}


def read(own, change=None, train=True, classes=None, reading=Reading(), **options):
    files, roots = [own.write(change, **options)], [str(own.images)]
    return read_coco(files, roots, *KEYS, train=train, classes=classes, reading=reading)


def registered(data):
    raise_errors(data)
    data.register(NAME)
    return seen()


def said(data):
    """The lines about repairs."""
    return [repair for summary in data.files for repair in summary.repairs]


def test_a_clean_file_is_read_by_detectron2_itself(own):
    data = read(own)
    assert registered(data) == CLEAN
    assert data.warnings == [] and said(data) == []
    assert MetadataCatalog.get(NAME).json_file == str(own.path / "own.json")
    (summary,) = data.files
    counts = summary.images, summary.objects, summary.crowds, summary.empty_images
    assert counts == (4, 11, 1, 1)
    assert summary.categories == {5: "cat", 90: "straße"} and summary.has_masks


# What has one meaning: (change, the line said, what of CLEAN is different then, how it is read)


def text_ids(data):
    for part, fields in (
        ("images", ["id"]),
        ("annotations", ["image_id", "category_id"]),
        ("categories", ["id"]),
    ):
        for row in data[part]:
            row.update({f: f"{row[f]}" for f in fields})


def words_for_ids(data):
    for row in data["images"]:
        row["id"] = f"image {row['id']}"
    for row in data["annotations"]:
        row["image_id"] = f"image {row['image_id']}"


def long_ids(data):
    for row in data["images"]:
        row["id"] += 10**30
    for row in data["annotations"]:
        row["image_id"] += 10**30


def each(part, **fields):
    def change(data):
        for i in range(len(data[part])):
            setter(part, i, **fields)(data)

    return change


def twice_under_two_ids(data):
    data["images"].append({**data["images"][0], "id": 70})
    data["annotations"].append(
        annotation(99, 70, 90, [40, 20, 9, 9], segmentation=[[40, 20, 49, 20, 49, 29]])
    )
    data["annotations"].append({**data["annotations"][0], "id": 98, "image_id": 70})


SQUARE = [[5, 5, 25, 5, 25, 15, 5, 15]]
REPAIRED = {
    "ids from 0": (setter("annotations", 0, id=0), "1 of 12 annotation ids.*id 0.*numbered", {}),
    "ids repeated": (setter("annotations", 1, id=1), "2 of 12 annotation ids", {}),
    "ids missing": (each("annotations", id=...), "12 of 12 annotation ids.*id none", {}),
    "ids of 20 digits": (setter("annotations", 0, id=10**19), "1 of 12 annotation ids", {}),
    "text ids": (text_ids, "30 numbers are text.*id '7' of images.*read as numbers", {}),
    "an id with a decimal point": (setter("annotations", 0, image_id=7.0), "1 numbers.*image_id 7.0", {}),
    "ids that are words": (words_for_ids, "4 of 4 images have ids that are no number.*'image 7'", {}),
    "ids beyond 63 bits": (long_ids, "4 of 4 images have ids that are no number of 63 bits", {}),
    "sizes as text": (setter("images", 0, width="60", height=40.0), "2 numbers.*width '60'", {}),
    "no sizes": (each("images", width=..., height=...), "4 of 4 images have no width.*'a.png' is 60x40", {}),
    "boxes as text": (setter("annotations", 0, bbox=["5", "5", "20.0", 10]), "1 numbers.*bbox", {}),
    "no iscrowd": (setter("annotations", 0, iscrowd=...), "1 of 12 annotations have no iscrowd", {}),
    "iscrowd of another type": (
        all_of(setter("annotations", 0, iscrowd=False), setter("annotations", 3, iscrowd=1.0)),
        "2 of 12 annotations have an iscrowd that is not 0 or 1.*False",
        {},
    ),
    "no area": (each("annotations", area=...), "12 of 12 annotations have no area", {}),
    "no box": (setter("annotations", 0, bbox=...), "1 of 12 annotations have no bbox.*the box around", {}),
    "no box, RLE": (
        setter("annotations", 1, bbox=[]),
        "1 of 12 annotations have no bbox",
        {A: [CAT, ("straße", [5, 5, 20, 10], False, True)]},
    ),
    "a flat polygon": (setter("annotations", 0, segmentation=SQUARE[0]), "1 of 12 polygons", {}),
    "a polygon of pairs": (
        setter("annotations", 0, segmentation=[[5, 5], [25, 5], [25, 15], [5, 15]]),
        "1 of 12 polygons are not",
        {},
    ),
    "short polygons beside good ones": (
        setter("annotations", 0, segmentation=[[1, 2, 3, 4], *SQUARE, [9, 9]]),
        "1 of 12 objects have polygons that show nothing.*annotation id 1 of image 'a.png'",
        {},
    ),
    "a polygon outside beside a good one": (
        setter("annotations", 0, segmentation=[*SQUARE, [99, 99, 120, 99, 120, 120]]),
        "lies outside its 60x40 image.*those left out",
        {},
    ),
    "no polygon of three points": (
        setter("annotations", 0, segmentation=[[1, 2, 3, 4]]),
        "1 of 12 objects have no polygon.*left out",
        {A: [ROAD]},
    ),
    "the same, in a run on boxes": (
        setter("annotations", 0, segmentation=[[1, 2, 3, 4]]),
        "1 of 12 segmentations cannot be used.*4 numbers",
        {A: [(*CAT[:3], False), ROAD]},
        BOXES,
    ),
    "RLE of another size, in a run on boxes": (
        setter("annotations", 0, segmentation=rle(WIDTH, HEIGHT)),
        "1 of 12 segmentations cannot be used",
        {A: [(*CAT[:3], False), ROAD]},
        BOXES,
    ),
    "polygons without points": (
        setter("annotations", 0, segmentation=[[]]),
        "1 of 12 polygons",
        {A: [(*CAT[:3], False), ROAD]},
        BOXES,
    ),
    "over the edges": (
        all_of(setter("annotations", 0, bbox=[-2.5, -3, 20, 10]), setter("annotations", 1, bbox=[50, 38, 15, 4])),
        "2 of 12 boxes reached over their image's edge .*over by 3 px.*clipped",
        {A: [("cat", [0, 0, 17.5, 7], False, True), ("straße", [50, 38, 10, 2], False, True)]},
    ),
    "no width": (setter("annotations", 0, bbox=[5, 5, 0, 10]), "1 of 12 boxes have width or height 0", {A: [ROAD]}),
    "outside": (setter("annotations", 0, bbox=[70, 5, 9, 9]), "1 of 12 boxes lie outside", {A: [ROAD]}),
    "of no image": (setter("annotations", 0, image_id=44), "of an image that is not listed.*image 44", {A: [ROAD]}),
    "of no category": (setter("annotations", 0, category_id=6), "of a category that is not.*category 6", {A: [ROAD]}),
    "an image twice": (extend("images", dict(GOOD["images"][0])), "1 images or categories are listed again.*id 7 of images", {}),
    "a category twice, otherwise the same": (
        extend("categories", {"id": 5, "name": "cat", "supercategory": "animal"}),
        "1 images or categories are listed again.*id 5 of cat",
        {},
    ),
    "an image under two ids": (
        twice_under_two_ids,
        "1 of 5 images are listed twice, under two ids.*'a.png'",
        {A: [CAT, ROAD, ("straße", [40, 20, 9, 9], False, True)]},
    ),
    "an object of it twice": (twice_under_two_ids, "objects are listed again.*listed once", {A: [CAT, ROAD, ("straße", [40, 20, 9, 9], False, True)]}),
    "two names of one file": (extend("images", {**GOOD["images"][0], "id": 70, "file_name": f"./{A}"}), "1 of 5 images are listed twice", {}),
    "Roboflow's root": (
        lambda d: d["categories"].append(dict(id=0, name="things", supercategory="none")),
        "1 of 3 categories name nothing.*'things'.*no class",
        {},
    ),
    "a supercategory": (
        lambda d: [c.update(supercategory="all") for c in d["categories"]]
        and d["categories"].append(dict(id=4, name="all")),
        "1 of 3 categories name nothing.*'all'",
        {},
    ),
    "a background": (extend("categories", {"id": 1, "name": "__background__"}), "1 of 3 categories name", {}),
    "UTF-16": (lambda d: json.dumps(d).encode("utf-16"), "not in plain UTF-8.*read as what it is", {}),
    "back slashes": (setter("images", 1, file_name="sub\\ünï 図.jpg"), "1 of 4 images are named.*matched", {}),
    "a path of Windows": (setter("images", 0, file_name="C:\\me\\images\\a.png"), "'a.png'.*matched", {}),
    "a path of another machine": (setter("images", 0, file_name="/home/me/images/a.png"), "1 of 4 images are named", {}),
    "the folder's own name": (setter("images", 1, file_name=f"images/{SUB}"), "1 of 4 images are named", {}),
    "a part of a URL": (setter("images", 1, file_name="http://x/images/sub/%C3%BCn%C3%AF%20%E5%9B%B3.jpg"), "1 of 4 images are named", {}),
    "an extension in capitals": (setter("images", 0, file_name="a.PNG"), "'a.PNG' is 'a.png'", {}),
    "Unicode of macOS": (
        setter("images", 1, file_name=unicodedata.normalize("NFD", SUB)),
        "in another Unicode form",
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REPAIRED)
def test_repaired(own, name):
    change, words, other, *reading = REPAIRED[name]
    data = read(own, change, reading=(reading or [Reading()])[0])
    before = Path(data.json_file).read_bytes()
    assert registered(data) == {**CLEAN, **other}
    (line,) = [x for x in said(data) if re.search(words, x)]
    assert sum(line in str(w) for w in data.warnings) == 1
    assert all(str(w).startswith("data.train_json=") and "\n" not in str(w) for w in data.warnings)
    assert (own.path / "own.json").read_bytes() == before
    # What was repaired is clean.
    again = read_coco([MetadataCatalog.get(NAME).json_file], [str(own.images)], *KEYS)
    assert again.errors == [] and said(again) == []


@pytest.mark.parametrize("name", ["no area", "UTF-16", "text ids"])
def test_repairs_can_be_refused(own, name):
    change, words, _ = REPAIRED[name]
    data = read(own, change, reading=Reading(repair=False))
    words = words.partition(".*")[0]
    assert [e for e in data.errors if re.search(words, e.problem)]
    assert said(data) == [] and all("correct them" in e.fix for e in data.errors)


def test_needless_things_are_not_missed(own):
    """No info, no licenses, no supercategory, "./", null for a mask in a run on boxes."""
    change = all_of(
        setter("annotations", 0, segmentation=None),
        setter("annotations", 1, segmentation=[]),
        setter("annotations", 4, segmentation=...),
        setter("images", 0, file_name="./a.png"),
    )
    data = read(own, change, reading=BOXES)
    assert registered(data)["./a.png"] == [(*CAT[:3], False), (*ROAD[:3], False)]
    assert data.files[0].repairs == () and data.files[0].unmasked == 3


@pytest.mark.parametrize(
    "bbox", [[59, 39, 2, 2], [-1, -1, 5, 5], [0, 0, 60, 40], [0.5, 2, 0.1, 0.1]]
)
def test_boxes_at_the_edge_are_left_as_they_are(own, bbox):
    data = read(own, setter("annotations", 0, bbox=bbox))
    assert registered(data)[A][0][1] == bbox and said(data) == []


def test_the_flat_boxes_of_coco_itself_are_left_to_detectron2(own):
    own.picture("000000200365.jpg")
    flat = setter("annotations", 0, bbox=[29.65, 38.33, 1.03, 0.0])
    data = read(own, all_of(flat, setter("images", 0, file_name="000000200365.jpg")))
    assert data.files[0].objects == 11 and said(data) == []


# What has none, or several: (change, the problem, the fix)


def boxes(function):
    def change(data):
        for a in data["annotations"]:
            a["bbox"] = function(*a["bbox"])

    return change


def corners(x, y, w, h):
    return [x, y, x + w, y + h]


def unmasked(data):
    for a in data["annotations"]:
        del a["segmentation"]


def crowds(data):
    for a in data["annotations"]:
        a["iscrowd"] = int(a["category_id"] == 5)


def scattered(data):
    """Twenty boxes, all over the image."""
    places = [[7 * (i % 6) + 4, 6 * (i // 6) + 8, 9, 7] for i in range(20)]
    data["annotations"] = [annotation(i + 1, 7, 5, box) for i, box in enumerate(places)]


POLYGONS, PIXELS = "write polygons", "four finite numbers"
REFUSED = {
    "truncated": (lambda d: json.dumps(d)[:-40], "cut short", "export it again"),
    "too deep": (lambda d: "[" * 100_000, "not a JSON file", "export it again"),
    "latin-1": (lambda d: json.dumps(d, ensure_ascii=False)[:-1].replace("図", "").encode("latin-1"), "JSON", "UTF-8"),
    "a list": (lambda d: [d], "holds a list", "images, annotations, categories"),
    "no annotations": (lambda d: d.pop("annotations") and d, "'annotations'", "with the lists"),
    "no images": (lambda d: d.update(images=[]), "'images' is empty", "with the lists"),
    "item not an object": (extend("annotations", 5), r"annotations\[12\] is 5", "JSON object"),
    "image without id": (setter("images", 0, id=None), r"images\[0\] has id none", "whole number"),
    "true for an id": (setter("categories", 0, id=True), "has id True", "whole number"),
    "two images of one id": (setter("images", 1, id=7), "images has id 7 twice", "unique"),
    "two categories of one id": (setter("categories", 0, id=5), "categories has id 5 twice", "unique"),
    "one name, two ids": (setter("categories", 0, name="cat"), "'cat'", "rename or merge"),
    "category without name": (setter("categories", 0, name=" "), "id 90 has name ' '", "a name"),
    "half a character": (lambda d: json.dumps(d).replace('"cat"', r'"\ud800"'), "id 5 has name", "UTF-8"),
    "no file name": (setter("images", 0, file_name=5), "has file_name 5", "file_name"),
    "height 0": (setter("images", 0, height=0), "'a.png' has height 0", "whole pixels"),
    "huge image": (setter("images", 0, width=10**9), "1000000000x40 pixels", "cannot be read"),
    "no bbox, no mask": (setter("annotations", 0, bbox=..., segmentation=[]), "'a.png' has bbox none", PIXELS),
    "bbox of 3": (setter("annotations", 0, bbox=[1, 2, 3]), r"bbox \[1, 2, 3\]", PIXELS),
    "bbox NaN": (setter("annotations", 0, bbox=[1, 2, float("nan"), 4]), "nan", PIXELS),
    "bbox of words": (setter("annotations", 0, bbox=["a", 2, 3, 4]), "'a'", PIXELS),
    "negative size": (setter("annotations", 0, bbox=[30, 20, -10, -9]), "-10, -9", "above 0"),
    "iscrowd 2": (setter("annotations", 0, iscrowd=2), "has iscrowd 2", "write 0"),
    "ignore": (setter("annotations", 0, ignore=1), "has ignore 1", "remove 'ignore'"),
    "odd polygon": (setter("annotations", 0, segmentation=[[1] * 7]), "7 numbers", POLYGONS),
    "polygon of NaN": (setter("annotations", 0, segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "finite", POLYGONS),
    "RLE turned": (setter("annotations", 1, segmentation=rle(60, 40)), r"\[60, 40\], its image is", "RLE of the image"),
    "keypoints": (setter("annotations", 0, keypoints=["x"]), "keypoints", "remove them"),
    "a tenth of no image": (
        all_of(setter("annotations", 0, image_id=44), setter("annotations", 1, image_id=44)),
        "2 of 12 annotations are of an image that is not listed",
        "correct them",
    ),
    "a tenth outside": (
        all_of(setter("annotations", 0, bbox=[70, 5, 9, 9]), setter("annotations", 1, bbox=[5, 50, 9, 9])),
        "2 of 12 boxes lie outside",
        "correct them",
    ),
    "half without area": (boxes(lambda x, y, w, h: [x, y, 0, h]), "12 of 12 boxes have width", "correct them"),
    "shares of the image": (
        all_of(unmasked, boxes(lambda x, y, w, h: [max(x, 0) / 60, y / 40, min(w, 60) / 60, min(h, 40) / 40])),
        "12 of 12 boxes lie within 0 and 1: shares of the image, not pixels",
        "multiply",
    ),
    "shares of the image in some": (
        all_of(setter("annotations", 0, bbox=[0.1, 0.2, 0.5, 0.5]), setter("annotations", 1, bbox=[0.3, 0.2, 0.1, 0.1])),
        "2 of 12 boxes lie within 0 and 1",
        "multiply",
    ),
    "centres beside polygons": (
        boxes(lambda x, y, w, h: [x + w / 2, y + h / 2, w, h]),
        "3 of 4 boxes are the centre and the size of their segmentation",
        "of the upper left corner",
    ),
    "rows first": (boxes(lambda x, y, w, h: [y, x, h, w]), "boxes are y, x, height, width of", "in pixels"),
    "percents": (
        boxes(lambda x, y, w, h: [x / 0.6, y / 0.4, w / 0.6, h / 0.4]),
        "boxes are percents of their segmentation",
        "in pixels",
    ),
    "corners beside polygons": (
        boxes(corners),
        r"boxes are the corners x0, y0, x1, y1 of their segmentation \(the first is \[5, 5, 25, 15\]",
        "width, height",
    ),
    "corners of few": (
        all_of(scattered, lambda d: d.update(annotations=d["annotations"][12:]), boxes(corners)),
        "boxes reach over the edge",
        "subtract",
    ),
    "corners alone": (
        all_of(scattered, boxes(corners)),
        "reach over the edge as x, y, width, height, and none as corners",
        "subtract",
    ),
    "no objects": (lambda d: d.update(annotations=[]), "no image has an object", "annotate"),
    "a class of crowds": (crowds, "all annotations of 'cat' are crowd regions", "set iscrowd to 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(own, name):
    change, problem, fix = REFUSED[name]
    data = read(own, change)
    (error,) = [e for e in data.errors if re.search(problem, e.problem)]
    assert error.key == "data.train_json" and error.value == str(own.path / "own.json")
    assert re.search(fix, error.fix) and len(str(error).splitlines()) == 1


def test_scattered_boxes_are_no_corners(own):
    assert read(own, scattered).errors == []


def test_large_objects_that_reach_over_a_little_are_clipped(own):
    def change(data):
        data["annotations"] = [annotation(i + 1, 7, 5, [1, 1, 61, 41]) for i in range(4)]

    assert {tuple(x[1]) for x in registered(read(own, change))[A]} == {(1, 1, 59, 39)}


def test_every_kind_of_fault_is_said_at_once(own):
    """What depends on something that is at fault itself is left out, and nothing else."""

    def change(data):
        data["images"].append({**image(12, "gone.png"), "width": 0})
        data["annotations"].append(annotation(12, 12, 5, [90, 90, 5, 5]))  # no size to be in
        data["annotations"][0]["bbox"] = [1, 2]
        data["annotations"][4]["bbox"] = [1, 2]
        data["annotations"][1].update(iscrowd=7, segmentation=[[1, 2, 3]] * 2 + [["x"]])
        data["categories"][0]["name"] = None

    (own.images / A).unlink()
    data = read(own, change)
    assert [(e.key, re.sub("[']|, its.*", "", e.problem)) for e in data.errors] == [
        ("data.train_json", "image gone.png has width 0"),
        ("data.train_json", "category id 90 has name none"),
        ("data.train_images", "no image file a.png"),
        ("data.train_json", "annotation id 1 of image a.png has bbox [1, 2] (and 1 more)"),
        ("data.train_json", "annotation id 2 of image a.png has iscrowd 7"),
        ("data.train_json", "annotation id 2 of image a.png has a polygon of 1 numbers"),
    ]


def test_files_that_are_not_there(own):
    (own.images / SUB).unlink()
    (own.images / EMPTY).unlink()
    (own.images / EMPTY).mkdir()
    path = own.write()
    found = read_coco([path], [str(own.images)], *KEYS).errors
    assert [e.problem for e in found] == ["no image file 'sub/ünï 図.jpg' (and 1 more)"]
    found = read_coco([path], [str(own.path / "none")], *KEYS).errors
    assert [str(e) for e in found] == [
        f"data.train_images={own.path}/none: no such folder; name the folder of data.train_json's images"
    ]
    with pytest.raises(ConfigError, match="none.json: cannot be read .*name an existing COCO json"):
        reading_of(own.path / "none.json", own.images)


def test_an_image_of_another_folder_is_not_taken_for_one_of_its_name(own):
    """Files of one name lie in many folders: matched is what says that it lay in a folder of this name."""
    (error,) = read(own, setter("images", 0, file_name="val/a.png")).errors
    assert "no image file 'val/a.png'" in str(error)
    (error,) = read(own, setter("images", 3, file_name="images/a.png")).errors
    assert "'a.png' and 'images/a.png' both fit one file, 'a.png'" in str(error)


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "/{}/secret.png"])
def test_images_elsewhere_are_not_read(own, name):
    Image.new("RGB", (WIDTH, HEIGHT)).save(own.path / "secret.png")
    (error,) = read(own, setter("images", 0, file_name=name.format(own.path))).errors
    assert error.key == "data.train_images" and "lies outside of it" in error.problem


def test_the_root_folder_takes_absolute_names(own):
    def change(data):
        for row in data["images"]:
            row["file_name"] = f"{own.images}/{row['file_name']}"

    assert read_coco([own.write(change)], ["/"], *KEYS).files[0].images == 4


def test_thin_images_are_found_before_training(own):
    own.picture("thin.png", (3000, 2))
    thin = extend("images", {**image(50, "thin.png"), "width": 3000, "height": 2})
    assert read(own, thin, reading=Reading(max_size=800)).errors == []  # 800 x 0.53, rounded to 1
    (error,) = read(own, thin, reading=Reading(max_size=700)).errors
    assert "'thin.png' of 3000x2 pixels has no side left" in str(error) and "crop it" in error.fix


# Warnings


def warned(data):
    raise_errors(data)
    return [w.problem for w in data.warnings]


def test_many_crowds_are_warned_of(own):
    some = all_of(setter("annotations", 4, iscrowd=1), setter("annotations", 5, iscrowd=1))
    (problem,) = warned(read(own, some))
    assert problem == "3 of 12 annotations are crowd regions (iscrowd 1), which are not trained on"
    (problem,) = warned(read(own, some, train=False))
    assert problem.endswith("ignored in evaluation")


def test_validation_without_objects_is_warned_of(own):
    assert warned(read(own, lambda d: d.update(annotations=[]), train=False)) == [
        "has no object to find: every AP will be nan"
    ]
    first, second = warned(read(own, each("annotations", iscrowd=1), train=False))
    assert first.startswith("12 of 12 annotations are crowd") and "every AP will be nan" in second


def test_empty_images_and_classes_are_warned_of(own):
    first, second = warned(read(own, lambda d: d.update(annotations=d["annotations"][:1])))
    assert first == "3 of 4 images have no object and are trained on as background"
    assert second.startswith("1 of 2 classes have no object here ('straße'): its scores are never")


# Classes of validation data, several files, registered names


def test_validation_classes_are_matched_by_name(own):
    def other_ids(data):
        data["categories"] = [
            dict(id=1, name="straße"),
            dict(id=2, name="cat"),
            dict(id=3, name="dog"),
        ]
        for a in data["annotations"]:
            a["category_id"] = {90: 1, 5: 2}[a["category_id"]]

    train = read(own)
    data = read(own, other_ids, train=False, classes=train.categories)
    assert registered(data) == CLEAN
    assert MetadataCatalog.get(NAME).thing_dataset_id_to_contiguous_id == {5: 0, 90: 1}
    assert [x.partition(" (")[0] for x in said(data)] == [
        "1 of 3 categories name nothing: a root, a background, unused",
        "2 of 3 classes are not listed, or have another id elsewhere",
    ]
    fewer = lambda d: d.update(categories=d["categories"][1:], annotations=d["annotations"][:1])  # noqa: E731
    assert registered(read(own, fewer, train=False, classes=train.categories))[A] == [CAT]
    assert MetadataCatalog.get(NAME).thing_classes == ["cat", "straße"]


def test_validation_objects_of_an_unknown_class_are_refused(own):
    data = read(
        own, setter("categories", 1, name="Cat"), train=False, classes={5: "cat", 90: "straße"}
    )
    (error,) = data.errors
    assert "has 3 objects of 'Cat', which is no class of training; 'cat' of training" in str(error)
    assert error.fix == "write the same list of categories into both files"


def test_several_files_are_one_data_set(own):
    """The same ids mean other images and objects, other ids the same class."""

    def second(data):
        data["images"] = [image(7, "b.png"), image(8, A)]
        data["categories"] = [{"id": 5, "name": "straße"}, {"id": 1, "name": "dog"}]
        data["annotations"] = [
            annotation(1, 7, 5, [1, 2, 3, 4], segmentation=[[1, 2, 4, 2, 4, 6]]),
            annotation(2, 8, 1, [7, 8, 9, 9], segmentation=[[7, 8, 16, 8, 16, 17]]),
        ]

    os.makedirs(own.path / "other")
    (own.images / A).rename(own.path / "other" / A)
    own.picture("../other/b.png")
    (own.path / "other" / A).rename(own.images / A)
    own.picture(f"../other/{A}")
    files = [own.write(), own.write(second, "second.json")]
    data = read_coco(files, [str(own.images), str(own.path / "other")], *KEYS)
    found = registered(data)
    dog = ("dog", [7, 8, 9, 9], False, True)
    assert found == {
        **CLEAN,
        f"{own.path}/other/b.png": [("straße", [1, 2, 3, 4], False, True)],
        f"{own.path}/other/{A}": [dog],
    }
    assert sum(x.images for x in data.files) == 6 and sum(x.objects for x in data.files) == 13
    ids = [r["image_id"] for r in DatasetCatalog.get(NAME)]
    assert len(set(ids)) == 6


def test_an_image_of_two_files_is_one_with_the_objects_of_both(own):
    def dogs(data):
        data["images"] = [image(1, A)]
        data["annotations"] = [
            annotation(1, 1, 1, [7, 8, 9, 9], segmentation=[[7, 8, 16, 8, 16, 17]])
        ]
        data["categories"] = [{"id": 1, "name": "dog"}]

    data = read_coco([own.write(), own.write(dogs, "dogs.json")], [str(own.images)] * 2, *KEYS)
    found = registered(data)
    assert found[A] == [CAT, ROAD, ("dog", [7, 8, 9, 9], False, True)]
    assert len(found) == 4 and "1 of 1 images are listed twice" in said(data)[0]


def test_what_is_registered_is_replaced_by_other_content_of_the_same_path(own):
    assert registered(read(own)) == CLEAN
    metadata = MetadataCatalog.get(NAME)
    assert metadata.thing_dataset_id_to_contiguous_id == {5: 0, 90: 1}
    assert metadata.evaluator_type == "coco" and metadata.thing_classes == ["cat", "straße"]
    registered(read(own, extend("categories", {"id": 6, "name": "dog"})))
    assert MetadataCatalog.get(NAME).thing_classes == ["cat", "dog", "straße"]


def test_classes_are_known_without_the_images(own):
    root = extend("categories", dict(id=0, name="things", supercategory="none"))
    assert read_classes([own.write(root)]) == ["cat", "straße"]
    (own.images / A).unlink()
    assert read_classes([own.write(), own.write(root, "b.json")]) == ["cat", "straße"]
    assert read_classes([own.write(lambda d: "[")]) == []


def test_registered_names_are_repaired_where_detectron2_reads_them(own):
    register_coco_instances(
        NAME, {"colour": 3}, own.write(REPAIRED["over the edges"][0]), str(own.images)
    )
    data = read_registered(NAME, "dataloader.train.dataset.names", train=True)
    assert data.errors == [] and seen()[A] == REPAIRED["over the edges"][2][A]
    assert MetadataCatalog.get(NAME).colour == 3
    other = f"{NAME}_2"
    DatasetCatalog.register(other, lambda: [])  # nobody knows what this reads
    assert read_registered(other, "dataloader.train.dataset.names", train=True) is None
    json_file = own.write(setter("annotations", 0, id=0))
    MetadataCatalog.get(other).set(json_file=json_file, image_root=str(own.images))
    (error,) = read_registered(other, "dataloader.train.dataset.names", train=True).errors
    assert "annotation ids" in error.problem
    MetadataCatalog.get(other).evaluator_type = "lvis"  # whose json has other rules
    assert read_registered(other, "dataloader.train.dataset.names", train=True) is None
