import copy
import json
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from PIL import Image

from sharedkd.data import coco as coco_module
from sharedkd.data.coco import check_coco, check_same_classes, register_coco
from sharedkd.errors import ConfigError, Findings

HEIGHT, WIDTH = 40, 60


def rle(height, width):
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[5:15, 5:25] = 1
    encoded = mask_util.encode(mask)
    return {"size": [height, width], "counts": encoded["counts"].decode()}


def annotation(id, image_id, category_id, bbox, **more):
    area = bbox[2] * bbox[3]
    fields = dict(id=id, image_id=image_id, category_id=category_id, bbox=bbox, area=area)
    return {**fields, "iscrowd": 0, **more}


GOOD = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 3, "file_name": "sub/ünï 図.jpg", "width": WIDTH, "height": HEIGHT},
        {"id": 9, "file_name": "empty.png", "width": WIDTH, "height": HEIGHT},
    ],
    "annotations": [
        annotation(1, 7, 5, [5, 5, 20, 10], segmentation=[[5, 5, 25, 5, 25, 15, 5, 15]]),
        annotation(2, 7, 90, [5.5, 5, 20, 10], segmentation=rle(HEIGHT, WIDTH)),
        # Sticks out by less than a pixel, as some of COCO's own boxes do.
        annotation(4, 3, 5, [-0.4, 30, 60.8, 10.9], segmentation=[[0, 30, 60, 30, 60, 40, 0, 40]]),
        annotation(
            8,
            3,
            5,
            [0, 0, 60, 40],
            segmentation={"size": [HEIGHT, WIDTH], "counts": [400, 2000]},
            iscrowd=1,
        ),
    ],
    # Ids with a gap and out of order.
    "categories": [{"id": 90, "name": "straße"}, {"id": 5, "name": "cat"}],
}


@pytest.fixture
def own(tmp_path):
    """Writes (a change of) GOOD with its images; returns the arguments of check_coco."""
    root = tmp_path / "images"
    for image in GOOD["images"]:
        path = root / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(path)

    def write(change=None, name="own.json"):
        data = copy.deepcopy(GOOD)
        data = (change and change(data)) or data
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name), str(root), "data.train_json", "data.train_images"

    return write


def setter(part, index, **fields):
    """A change of one item: None deletes the field."""

    def change(data):
        item = data[part][index]
        for field, value in fields.items():
            if value is None:
                del item[field]
            else:
                item[field] = value

    return change


def extend(part, item):
    return lambda data: data[part].append(item)


def merged(first, second):
    def change(data):
        first(data)
        second(data)

    return change


# name -> (change, what the message must contain: the value at fault, then the fix)
BAD_JSON = {
    "truncated": (lambda d: json.dumps(d)[:-40], "cut short", "export it again"),
    "not json": (lambda d: "<xml/>", "not a JSON file", "export it again"),
    "too deep": (lambda d: "[" * 100_000, "not a JSON file", "export it again"),
    "a list": (lambda d: [d], "holds a list", "images, annotations, categories"),
    "no annotations": (lambda d: d.pop("annotations") and d, "'annotations'", "with the lists"),
    "images a dict": (lambda d: d.update(images={}), "no list 'images'", "with the lists"),
    "no images": (lambda d: d.update(images=[]), "'images' is empty", "with the lists"),
    "no categories": (lambda d: d.update(categories=[]), "'categories' is empty", "with the lists"),
    "item not an object": (extend("annotations", 5), r"annotations\[4\] is 5", "JSON object"),
    "float id": (setter("images", 0, id=7.0), r"images\[0\] has id 7.0", "3, not 3.0"),
    "no id": (setter("annotations", 1, id=None), r"annotations\[1\] has id none", "whole-number"),
    "true for id": (setter("categories", 0, id=True), "has id True", "whole-number"),
    "image id twice": (setter("images", 1, id=7), "images has id 7 twice", "unique"),
    "annotation id twice": (setter("annotations", 1, id=1), "has id 1 twice", "unique"),
    "category id twice": (setter("categories", 0, id=5), "categories has id 5 twice", "unique"),
    "category name twice": (setter("categories", 0, name="cat"), "'cat'", "rename or merge"),
    "category without name": (setter("categories", 0, name=None), "id 90 has name", "a name"),
    "blank category name": (setter("categories", 0, name=" "), "id 90 has name ' '", "a name"),
    "no file name": (setter("images", 0, file_name=None), "image id 7", "file_name"),
    "number for file name": (setter("images", 0, file_name=5), "file_name 5", "file_name"),
    "no width": (setter("images", 0, width=None), "'a.png' has width none", "whole pixels"),
    "height 0": (setter("images", 0, height=0), "'a.png' has height 0", "whole pixels"),
    "negative width": (setter("images", 0, width=-60), "has width -60", "whole pixels"),
    "float width": (setter("images", 0, width=60.0), "has width 60.0", "whole pixels"),
    "unknown image": (
        setter("annotations", 0, image_id=44),
        "annotation id 1 is of image 44",
        "correct its image_id",
    ),
    "text for image": (setter("annotations", 0, image_id="7"), "image '7'", "image_id"),
    "unknown category": (
        setter("annotations", 1, category_id=6),
        "annotation id 2 is of category 6",
        "add the category",
    ),
    "no bbox": (setter("annotations", 0, bbox=None), "'a.png' has bbox none", "four finite"),
    "empty bbox": (setter("annotations", 0, bbox=[]), r"has bbox \[\]", "four finite"),
    "bbox of 3": (setter("annotations", 0, bbox=[1, 2, 3]), r"bbox \[1, 2, 3\]", "four finite"),
    "bbox of text": (setter("annotations", 0, bbox=["1", 2, 3, 4]), "'1'", "four finite"),
    "bbox NaN": (setter("annotations", 0, bbox=[1, 2, float("nan"), 4]), "nan", "four finite"),
    "bbox inf": (setter("annotations", 0, bbox=[1, 2, float("inf"), 4]), "inf", "four finite"),
    "bbox huge": (setter("annotations", 0, bbox=[1, 2, 10**400, 4]), "annotation id 1", "finite"),
    "zero width": (setter("annotations", 0, bbox=[5, 5, 0, 10]), "empty box", "above 0"),
    "zero height": (setter("annotations", 0, bbox=[5, 5, 10, 0]), "empty box", "above 0"),
    "negative size": (setter("annotations", 0, bbox=[30, 20, -10, -9]), "-10, -9", "above 0"),
    "sticks out right": (setter("annotations", 0, bbox=[50, 5, 12, 5]), "by 2 px", "not corners"),
    "sticks out bottom": (setter("annotations", 0, bbox=[5, 35, 5, 6.5]), "1.5 px", "clip"),
    "sticks out left": (setter("annotations", 0, bbox=[-1.5, 5, 20, 5]), "1.5 px", "clip"),
    "sticks out above": (setter("annotations", 0, bbox=[5, -9, 20, 20]), "by 9 px", "clip"),
    "outside": (setter("annotations", 0, bbox=[60, 5, 0.5, 5]), "lies outside its 60x40", "clip"),
    "outside left": (setter("annotations", 0, bbox=[-0.9, 5, 0.5, 5]), "lies outside", "clip"),
    "outside above": (setter("annotations", 0, bbox=[5, -0.9, 5, 0.5]), "lies outside", "clip"),
    "iscrowd 2": (setter("annotations", 0, iscrowd=2), "has iscrowd 2", "write 0"),
    "ignore": (setter("annotations", 0, ignore=1), "has ignore 1", "remove 'ignore'"),
    "polygon of 4": (setter("annotations", 0, segmentation=[[1, 2, 3, 4]]), "4 numbers", "polygon"),
    "odd polygon": (setter("annotations", 0, segmentation=[[1] * 7]), "7 numbers", "polygons"),
    "flat polygon": (setter("annotations", 0, segmentation=[1, 2, 3, 4, 5, 6]), "has 1", "polygon"),
    "polygon NaN": (
        setter("annotations", 0, segmentation=[[1, 2, 3, 4, 5, float("nan")]]),
        "finite",
        "remove the object",
    ),
    "text for mask": (setter("annotations", 0, segmentation="x"), "segmentation 'x'", "polygons"),
    "empty RLE": (setter("annotations", 0, segmentation={}), "size none", "RLE"),
    "RLE turned": (
        setter("annotations", 1, segmentation=rle(WIDTH, HEIGHT)),
        r"annotation id 2 .* size \[60, 40\], its image is \[40, 60\]",
        "RLE of the image's size",
    ),
    "RLE short": (
        setter("annotations", 3, segmentation={"size": [HEIGHT, WIDTH], "counts": [9, 9]}),
        "do not fill its 60x40",
        "RLE of the image's size",
    ),
    "RLE string of another size": (
        setter("annotations", 1, segmentation={**rle(50, 80), "size": [HEIGHT, WIDTH]}),
        "do not fill its 60x40",
        "RLE of the image's size",
    ),
    "RLE cut": (
        setter("annotations", 1, segmentation={"size": [HEIGHT, WIDTH], "counts": "ool"}),
        "'ool'",
        "RLE of the image's size",
    ),
    "RLE no counts": (
        setter("annotations", 1, segmentation={"size": [HEIGHT, WIDTH]}),
        "counts none",
        "RLE of the image's size",
    ),
    "RLE of floats": (
        setter("annotations", 1, segmentation={**rle(HEIGHT, WIDTH), "size": [40.0, 60.0]}),
        r"size \[40.0, 60.0\]",
        "RLE of the image's size",
    ),
    "polygon far out": (
        setter("annotations", 0, segmentation=[[0, 0, 1e9, 0, 1e9, 9]]),
        "by more than its size",
        "polygons",
    ),
    "keypoints": (setter("annotations", 0, keypoints=["x"]), "keypoints", "remove them"),
    "id of 20 digits": (setter("annotations", 0, id=10**19), "has id 1000", "18 digits"),
    "half a character": (
        lambda d: json.dumps(d).replace('"cat"', r'"\ud800"'),
        "id 5 has name '.ud800'",
        "UTF-8",
    ),
    "huge image": (setter("images", 0, width=10**9), "1000000000x40 pixels", "cannot be read"),
    "all images empty": (lambda d: d.update(annotations=[]), "no image has an object", "annotate"),
    "nothing but crowd": (lambda d: d.update(annotations=d["annotations"][3:]), "object", "crowd"),
}


def message_of(call, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("change, value, fix", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json(own, change, value, fix):
    arguments = own(change)
    message = message_of(check_coco, *arguments)
    assert message.startswith(f"data.train_json={arguments[0]}: ")
    problem, _, advice = message.partition("; ")
    assert re.search(value, problem)
    assert re.search(fix, advice)


def test_good(own):
    summary = check_coco(*own())
    assert (summary.images, summary.objects, summary.crowds, summary.empty_images) == (3, 3, 1, 1)
    assert summary.categories == {5: "cat", 90: "straße"}
    assert summary.classes == ["cat", "straße"]
    assert summary.has_masks and summary.has_rle
    assert check_coco(*own(), train=False) == summary


@pytest.mark.parametrize(
    "bbox", [[59, 39, 2, 2], [-1, -1, 5, 5], [0, 0, WIDTH, HEIGHT], [0.5, 0.5, 0.1, 0.1]]
)
def test_boxes_at_the_edge_pass(own, bbox):
    assert check_coco(*own(setter("annotations", 0, bbox=bbox))).objects == 3


def test_boxes_without_masks_pass(own):
    summary = check_coco(
        *own(
            merged(
                setter("annotations", 0, segmentation=None),
                setter("annotations", 1, segmentation=[]),
            )
        )
    )
    assert summary.unmasked == 2 and not summary.has_masks


def test_the_flat_boxes_of_coco_itself_pass(own, tmp_path):
    flat = setter("annotations", 0, bbox=[29.65, 38.33, 1.03, 0.0])
    rename = setter("images", 0, file_name="000000200365.jpg")
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / "000000200365.jpg")
    assert check_coco(*own(merged(flat, rename))).objects == 3
    assert "empty box" in message_of(check_coco, *own(flat))


def test_many_faults_give_their_number_and_the_first(own):
    def change(data):
        for a in data["annotations"][:3]:
            a["bbox"][2] = 0

    message = message_of(check_coco, *own(change))
    assert "annotation id 1 of" in message and "(and 2 more)" in message
    assert "more)" not in message_of(check_coco, *own(setter("annotations", 2, bbox=[1, 1, 0, 1])))


def test_every_kind_of_fault_is_said_at_once(own, tmp_path):
    """What depends on something that is at fault itself is left out, and nothing else."""

    def change(data):
        data["images"].append({"id": 11, "file_name": "gone.png", "width": 0, "height": 9})
        data["annotations"].append(annotation(12, 11, 5, [90, 90, 5, 5]))  # no size to be in
        data["annotations"].append(annotation(13, 44, 6, [1, 1, 0, 0], iscrowd=7))
        data["annotations"][0]["bbox"] = [1, 2, "3"]
        data["annotations"][1]["bbox"] = [1, 2, 0, 0]
        data["annotations"][2].update(bbox=[1, 2, -3, 0], segmentation=[[1, 2]])

    arguments = own(change)
    (tmp_path / "images/a.png").unlink()
    with pytest.raises(ConfigError) as caught:
        check_coco(*arguments)
    assert [e.problem.replace("'", "") for e in caught.value.errors] == [
        "image gone.png has width 0",
        "annotation id 1 of image a.png has bbox [1, 2, 3]",
        "annotation id 2 of image a.png has an empty box [1, 2, 0, 0] (and 1 more)",
        mock.ANY,
        "annotation id 13 is of image 44, which does not exist",
        "annotation id 13 is of category 6, which does not exist",
        "annotation id 13 has iscrowd 7",
        "no image file a.png",
    ]
    assert "2 numbers" in caught.value.errors[3].problem
    findings = Findings()
    summary = check_coco(*arguments, findings=findings)
    assert summary.refused
    assert (summary.images, summary.objects, summary.broken_annotations) == (4, 4, 4)
    assert len(findings.errors) == len(caught.value.errors)


def test_a_file_without_any_sound_image(own):
    message = message_of(check_coco, *own(lambda d: [i.pop("width") for i in d["images"]] and d))
    assert "has width none (and 2 more)" in message


def test_line_breaks_in_values_do_not_break_the_line(own):
    change = setter("images", 0, file_name="a\nb\u2028c\rd.png")
    assert "no image file" in message_of(check_coco, *own(change))


@pytest.mark.parametrize(
    "change, value, fix",
    [
        (setter("annotations", 0, area=None), "annotation id 1 has area none", "mask's area"),
        (setter("annotations", 0, area=-1), "has area -1", "mask's area"),
        (setter("annotations", 0, iscrowd=None), "annotation id 1 has no iscrowd", "write 0"),
        (setter("annotations", 0, id=0), "annotation id 0", "number from 1"),
    ],
)
def test_what_evaluation_reads_is_asked_of_val_only(own, change, value, fix):
    arguments = own(change)
    assert check_coco(*arguments).objects == 3
    message = message_of(check_coco, *arguments, train=False)
    assert value in message and fix in message


def test_val_without_objects_passes(own):
    summary = check_coco(*own(lambda d: d.update(annotations=[])), train=False)
    assert summary.empty_images == 3


def test_missing_json(tmp_path, own):
    _, *others = own()
    for path in (tmp_path / "none.json", tmp_path):
        message = message_of(check_coco, path, *others)
        assert f"data.train_json={path}" in message and "name an existing" in message
    (tmp_path / "latin.json").write_bytes(json.dumps(GOOD, ensure_ascii=False).encode("utf-16"))
    assert "UTF-8" in message_of(check_coco, tmp_path / "latin.json", *others)


def test_missing_images(own, tmp_path):
    arguments = own()
    message = message_of(check_coco, arguments[0], tmp_path / "none", *arguments[2:])
    assert message.startswith(f"data.train_images={tmp_path / 'none'}: no such folder")
    (tmp_path / "images" / "sub" / "ünï 図.jpg").unlink()
    (tmp_path / "images" / "empty.png").unlink()
    message = message_of(check_coco, *arguments)
    assert message.startswith(f"data.train_images={arguments[1]}: ")
    assert "'sub/ünï 図.jpg' (and 1 more)" in message and "correct" in message


def test_crowd_regions_need_masks_where_masks_are_evaluated(own):
    arguments = own(setter("annotations", 3, segmentation=[]))
    assert check_coco(*arguments).has_masks
    assert check_coco(*arguments, train=False).unmasked == 1


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "/{}/secret.png"])
def test_images_elsewhere_are_not_read(own, tmp_path, name):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "secret.png")
    arguments = own(setter("images", 0, file_name=name.format(tmp_path)))
    message = message_of(check_coco, *arguments)
    assert message.startswith(f"data.train_images={arguments[1]}: ")
    assert "lies outside of it" in message and "/ for absolute names" in message
    if name.startswith("/"):
        data = json.loads(Path(arguments[0]).read_text())
        for image in data["images"][1:]:
            image["file_name"] = f"{arguments[1]}/{image['file_name']}"
        Path(arguments[0]).write_text(json.dumps(data))
        assert check_coco(arguments[0], "/", *arguments[2:]).images == 3


def test_names_below_the_folder_may_go_up_and_down(own):
    assert check_coco(*own(setter("images", 0, file_name="sub/../a.png"))).images == 3


def test_what_passes_can_be_parsed_and_copied_from_deep_in_the_stack(own):
    """pycocotools reads the file anew, and copies its info, from further down than the check."""

    def info(depth):
        def change(data):
            for _ in range(depth):
                data["info"] = [data.get("info")]

        return change

    def further_down(frames, function, *args):
        return further_down(frames - 1, function, *args) if frames else function(*args)

    refused, limit = 0, sys.getrecursionlimit()
    for depth in range(50, 1000, 50):
        sys.setrecursionlimit(10 * limit)  # to write it
        arguments = own(info(depth))
        sys.setrecursionlimit(limit)
        try:
            check_coco(*arguments)
        except ConfigError as e:
            assert "nested too deeply" in str(e)
            refused += 1
            continue
        data = further_down(100, json.loads, Path(arguments[0]).read_text())
        further_down(100, copy.deepcopy, data["info"])
    assert 0 < refused < 19


def test_folder_in_place_of_an_image(own, tmp_path):
    (tmp_path / "images" / "a.png").unlink()
    (tmp_path / "images" / "a.png").mkdir()
    assert "no image file 'a.png'" in message_of(check_coco, *own())


def test_image_of_another_size(own, tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(tmp_path / "images" / "a.png")
    message = message_of(check_coco, *own())
    assert message.startswith("data.train_images=")
    assert "'a.png' is 60x41, not 60x40" in message and "correct the image" in message
    assert check_coco(*own(), verify_sizes=False).images == 3


def test_image_that_is_none(own, tmp_path):
    (tmp_path / "images" / "a.png").write_bytes(b"text")
    assert "'a.png' cannot be read as an image" in message_of(check_coco, *own())


@pytest.mark.parametrize("orientation, good", [(1, False), (3, False), (6, True), (8, True)])
def test_images_turned_by_exif_are_measured_upright(own, tmp_path, orientation, good):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "images" / "turned.jpg"
    Image.new("RGB", (HEIGHT, WIDTH)).save(path, exif=exif)
    arguments = own(setter("images", 2, file_name="turned.jpg"))
    if good:
        # What Detectron2 itself says of such an image.
        mapper = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")
        mapper({"file_name": str(path), "height": HEIGHT, "width": WIDTH})
        check_coco(*arguments)
    else:
        assert "is 40x60, not 60x40" in message_of(check_coco, *arguments)


def test_headers_are_read_from_a_spread_sample(own, tmp_path, monkeypatch):
    def change(data):
        data["images"] = [dict(GOOD["images"][0], id=i) for i in range(1, 2501)]
        data["annotations"] = [annotation(1, 7, 5, [5, 5, 20, 10])]

    opened = []
    monkeypatch.setattr(
        coco_module.Image, "open", lambda p: opened.append(p) or Image.new("L", (1, 1))
    )
    message = message_of(check_coco, *own(change))
    assert 500 <= len(opened) <= 1000
    assert f"(and {len(opened) - 1} more)" in message


def test_same_classes(own):
    train = check_coco(*own())

    def val(change):
        path, root, *_ = own(change, "val.json")
        return check_coco(path, root, "data.val_json", "data.val_images", train=False)

    check_same_classes(train, val(lambda d: d["categories"].reverse()))
    for change, expected in (
        (extend("categories", {"id": 6, "name": "dog"}), "only data.val_json has 1: 6 'dog'"),
        (setter("categories", 1, name="dog"), "id 5 is 'cat' and 'dog'"),
        (lambda d: d.update(categories=d["categories"][1:], annotations=[]), "90 'straße'"),
    ):
        message = message_of(check_same_classes, train, val(change))
        assert (
            message.startswith("data.val_json=") and f"data.train_json={train.json_file}" in message
        )
        assert expected in message and "same list of categories" in message


@pytest.fixture
def name():
    yield "own_of_test"
    for catalog in (DatasetCatalog, MetadataCatalog):
        if "own_of_test" in catalog:
            catalog.remove("own_of_test")


def test_register(own, name):
    json_file, root, *_ = own()
    register_coco(name, json_file, root)
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["cat", "straße"]
    assert metadata.thing_dataset_id_to_contiguous_id == {5: 0, 90: 1}
    assert (metadata.json_file, metadata.image_root) == (json_file, root)
    assert metadata.evaluator_type == "coco"

    register_coco(name, json_file, root)
    assert MetadataCatalog.get(name) is metadata

    records = DatasetCatalog.get(name)
    assert [r["image_id"] for r in records] == [3, 7, 9]
    assert [a["category_id"] for a in records[1]["annotations"]] == [0, 1]

    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    assert [len(mapper(r)["instances"]) for r in records] == [1, 2, 0]


def test_register_again_with_other_data(own, name):
    json_file, root, *_ = own()
    register_coco(name, json_file, root)
    DatasetCatalog.get(name)
    # The same path with other content, then another path.
    own(extend("categories", {"id": 6, "name": "dog"}))
    register_coco(name, json_file, root)
    assert MetadataCatalog.get(name).thing_classes == ["cat", "dog", "straße"]
    other, *_ = own(name="other.json")
    register_coco(name, other, root)
    assert MetadataCatalog.get(name).json_file == other
    assert len(DatasetCatalog.get(name)) == 3
    assert MetadataCatalog.get(name).thing_classes == ["cat", "straße"]
