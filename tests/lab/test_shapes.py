import hashlib
import json
from collections import defaultdict

import cv2
import numpy as np
import pytest
from coco_files import decode

from sharedkd.lab import shapes as shapes_module
from sharedkd.lab.shapes import CLASSES, make_shapes

ARGUMENTS = dict(train=30, val=6, size=(128, 160), seed=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", **ARGUMENTS)


def digest(root):
    files = [p for p in sorted(root.rglob("*")) if p.is_file()]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def objects_by_image(root, split):
    data = json.loads((root / f"{split}.json").read_text())
    objects = defaultdict(list)
    for annotation in data["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    return [(image, objects[image["id"]]) for image in data["images"]]


def test_same_arguments_same_bytes(root, tmp_path):
    assert digest(make_shapes(tmp_path / "again", **ARGUMENTS)) == digest(root)


def test_other_seed_other_pictures(root, tmp_path):
    other = digest(make_shapes(tmp_path, **{**ARGUMENTS, "seed": 4}))
    assert all(other[f"{s}.json"] != digest(root)[f"{s}.json"] for s in ("train", "val"))
    assert other["train/000000.jpg"] != digest(root)["train/000000.jpg"]


def test_splits_differ_and_a_longer_one_starts_the_same(root, tmp_path):
    longer = digest(make_shapes(tmp_path, **{**ARGUMENTS, "train": 32}))
    written = digest(root)
    assert longer["train/000029.jpg"] == written["train/000029.jpg"]
    assert "train/000031.jpg" in longer
    assert written["train/000000.jpg"] != written["val/000000.jpg"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_agree_with_boxes_and_areas_and_are_disjoint(root, split):
    for image, objects in objects_by_image(root, split):
        taken = np.zeros((image["height"], image["width"]), int)
        for annotation in objects:
            mask = decode(annotation["segmentation"], *taken.shape)
            rows, columns = np.nonzero(mask)
            x, y = columns.min(), rows.min()
            box = [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
            assert annotation["bbox"] == box
            assert annotation["area"] == mask.sum() > 0
            taken += mask
        assert taken.max(initial=0) <= 1


def test_variety(root):
    everything = objects_by_image(root, "train")
    objects = [annotation for _, annotations in everything for annotation in annotations]
    assert {a["category_id"] for a in objects} == set(range(1, len(CLASSES) + 1))
    assert {type(a["segmentation"]) for a in objects} == {list, dict}
    assert min(a["area"] for a in objects) < 16**2
    assert max(a["area"] for a in objects) > 48**2
    assert len({(i["height"], i["width"]) for i, _ in everything}) > 20
    assert any(not annotations for _, annotations in everything)


def test_objects_stand_out_from_what_is_around_them(root):
    contrasts = []
    for image, objects in objects_by_image(root, "train"):
        picture = cv2.imread(str(root / "train" / image["file_name"])).astype(float)
        assert picture.shape == (image["height"], image["width"], 3)
        masks = [decode(a["segmentation"], *picture.shape[:2]) for a in objects]
        for mask in masks:
            around = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))).astype(bool) & ~mask
            contrasts.append(np.linalg.norm(picture[mask].mean(0) - picture[around].mean(0)))
    # A mask in the wrong place would cover much the same colours as its surroundings.
    assert np.median(contrasts) > 30


def test_nothing_behind_is_painted_over_what_is_in_front(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes_module, "_texture", lambda _, h, w, amplitude: np.zeros((h, w, 3)))
    root = make_shapes(tmp_path, train=20, val=1)
    for image, objects in objects_by_image(root, "train"):
        picture = cv2.imread(str(root / "train" / image["file_name"])).astype(float)
        for annotation in objects:
            mask = decode(annotation["segmentation"], *picture.shape[:2]).astype(np.uint8)
            inside = cv2.erode(mask, np.ones((5, 5)), borderValue=0).astype(bool)
            # One colour but for the noise, whose deviation is 10 at the most.
            if inside.sum() > 50:
                assert picture[inside].std(0).max() < 15


def test_complete_folder_is_left_alone(tmp_path):
    make_shapes(tmp_path, train=2, val=1)
    picture = tmp_path / "train" / "000000.jpg"
    picture.write_bytes(b"kept")
    make_shapes(tmp_path, train=2, val=1)
    assert picture.read_bytes() == b"kept"


@pytest.mark.parametrize("lost", ["params.json", "val.json", "train/000001.jpg"])
def test_half_written_folder_is_redone(tmp_path, lost):
    make_shapes(tmp_path, train=2, val=1)
    whole = digest(tmp_path)
    (tmp_path / lost).unlink()
    (tmp_path / "train.json").write_text('{"images": [')
    make_shapes(tmp_path, train=2, val=1)
    assert digest(tmp_path) == whole


@pytest.mark.parametrize("bad", [dict(train=0), dict(val=0), dict(size=(32, 192))])
def test_bad_arguments(tmp_path, bad):
    with pytest.raises(ValueError, match="at least 1 image and 64 pixels"):
        make_shapes(tmp_path, **bad)
