"""tools/convert_data.py, by what the two formats say; foreign files are named."""

import json

import pytest
import tiny
from coco_files import NAME, reading_of, seen
from PIL import Image

from sharedkd.errors import ConfigError
from sharedkd.lab.convert import convert_voc, convert_yolo

VOC = """<annotation><filename>{name}</filename>
<size><width>{width}</width><height>40</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult><bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>
<object><name>dog</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>60</xmax><ymax>40</ymax></bndbox></object>
</annotation>"""


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40)).save(path)


def test_yolo(tmp_path, capsys):
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    for name in ("train/a.jpg", "train/b.jpg", "val/c.jpg"):
        picture(tmp_path / "images" / name)
    labels = tmp_path / "labels" / "train"
    labels.mkdir(parents=True)
    # A box about (0.5, 0.5), a quarter of each side; a triangle.
    (labels / "a.txt").write_text("1 0.5 0.5 0.25 0.25\n0 0.1 0.1 0.6 0.1 0.6 0.5\n")
    command = ["convert_data.py", "yolo", f"{tmp_path}/data.yaml", f"{tmp_path}/out"]
    assert not tiny.run_tool(*command)
    root = f"{tmp_path}/images/train"
    said = capsys.readouterr().out
    assert f"data.train_json={tmp_path}/out/train.json data.train_images={root}" in said
    reading_of(f"{tmp_path}/out/train.json", root, train=False).register(NAME)
    assert seen() == {
        "a.jpg": [("dog", [22.5, 15, 15, 10], False, False), ("cat", [6, 4, 30, 16], False, True)],
        "b.jpg": [],
    }
    triangle = json.loads((tmp_path / "out/train.json").read_text())["annotations"][1]
    assert triangle["segmentation"] == [[6, 4, 36, 4, 36, 20]] and triangle["area"] == 240
    val = reading_of(f"{tmp_path}/out/val.json", f"{tmp_path}/images/val", train=False)
    assert val.files[0].images == 1
    # Of poses: keypoints follow the box.
    with open(tmp_path / "data.yaml", "a") as f:
        f.write("kpt_shape: [2, 2]\n")
    (labels / "a.txt").write_text("1 0.5 0.5 0.25 0.25 0.4 0.4 0.6 0.6\n")
    convert_yolo(tmp_path, tmp_path / "out")
    reading_of(f"{tmp_path}/out/train.json", root, train=False).register(NAME)
    assert seen()["a.jpg"] == [("dog", [22.5, 15, 15, 10], False, False)]
    (labels / "b.txt").write_text("7 0.5 0.5 0.25 0.25\n")
    with pytest.raises(ConfigError, match=f"{labels}/b.txt: line 1 is no box"):
        convert_yolo(tmp_path, tmp_path / "out")


def test_two_sets_of_one_name_are_refused(tmp_path):
    (tmp_path / "data.yaml").write_text("val: images\nvalid: images\nnames: [cat]\n")
    picture(tmp_path / "images/a.jpg")
    with pytest.raises(ConfigError, match="data.yaml: names both val and valid"):
        convert_yolo(tmp_path, tmp_path / "out")


def test_voc(tmp_path, capsys):
    """Pixels count from 1, the last one included; the size may be missing."""
    for name, width in (("a", 60), ("b", 0)):
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        (tmp_path / "Annotations" / f"{name}.xml").write_text(
            VOC.format(name=f"{name}.jpg", width=width)
        )
    convert_voc(tmp_path, tmp_path / "out")
    reading_of(tmp_path / "out/all.json", tmp_path / "JPEGImages", train=False).register(NAME)
    objects = [("cat", [10, 5, 20, 15], False, False), ("dog", [0, 0, 60, 40], True, False)]
    assert seen() == {"a.jpg": objects, "b.jpg": objects}
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("b\nlost\n")
    (tmp_path / "ImageSets/Main/valid.txt").write_text("a\n")
    capsys.readouterr()
    assert list(convert_voc(tmp_path, tmp_path / "out")) == ["train", "val"]
    assert "train.txt: 1 of 2 have no xml and are left out (lost)" in capsys.readouterr().out
    assert [
        i["file_name"] for i in json.loads((tmp_path / "out/train.json").read_text())["images"]
    ] == ["b.jpg"]


def test_voc_files_of_one_name_in_two_folders(tmp_path):
    """As Roboflow writes them, each beside its image."""
    for folder, width in (("train", 60), ("valid", 90)):
        picture(tmp_path / folder / "1.jpg")
        text = VOC.format(name="1.jpg", width=width)
        (tmp_path / folder / "1.xml").write_text(text)
    written = convert_voc(tmp_path, tmp_path / "out")
    rows = {split: json.loads(path.read_text())["images"] for split, (path, _) in written.items()}
    assert {s: [(x["file_name"], x["width"]) for x in found] for s, found in rows.items()} == {
        "train": [("train/1.jpg", 60)],
        "val": [("valid/1.jpg", 90)],
    }
    (tmp_path / "train/1.jpg").rename(tmp_path / "1.jpg")
    picture(tmp_path / "more/1.jpg")
    with pytest.raises(ConfigError, match="train/1.xml: 3 images 1.jpg below"):
        convert_voc(tmp_path, tmp_path / "out")


FOREIGN = {
    "data.yaml": ("names: [a, b]\ntrain: x\n", "a YOLO data.yaml", "convert_data.py yolo"),
    "a.txt": ("0 0.5 0.5 0.2 0.2\n", "a label file of YOLO", "convert_data.py yolo"),
    "a.xml": (VOC, "an XML of Pascal VOC", "convert_data.py voc"),
    "cvat.xml": ("<?xml version='1.0'?><annotations><image/></annotations>", "CVAT's own XML", "export"),
    "a.csv": ("filename,x0,y0,x1,y1,class\na.jpg,1,2,3,4,cat\n", "a table (CSV)", "export"),
    "a.json.gz": (b"\x1f\x8b\x08\x00", "an archive", "unpack"),
    "a.jsonl": ('{"a": 1}\n{"a": 2}\n', "JSON in lines", "export"),
    "via.json": ({"_via_settings": {}, "_via_img_metadata": {}}, "a project of VIA", "COCO format"),
    "via2.json": ({"a1": {"filename": "a", "regions": []}}, "VIA's own json", "COCO format"),
    "labelme.json": ({"shapes": [], "imagePath": "a.jpg"}, "a LabelMe json", "labelme2coco"),
    "studio.json": ([{"data": {}, "annotations": []}], "a list of Label Studio's tasks", "COCO"),
    "createml.json": ([{"image": "a", "annotations": []}], "a CreateML json", "export"),
    "results.json": ([{"image_id": 1, "score": 0.5}], "detections in COCO's result", "ground truth"),
    "geo.json": ({"type": "FeatureCollection", "features": []}, "GeoJSON", "export"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_labels_of_another_format_are_named(own, name):
    content, what, fix = FOREIGN[name]
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    with pytest.raises(ConfigError) as caught:
        reading_of(own.write(lambda d: content, name), own.images)
    problem, _, advice = str(caught.value).partition("; ")
    assert f"is {what}" in problem and "not COCO json" in problem and fix in advice


@pytest.mark.parametrize(
    "files, what",
    [
        (["a.xml", "a.jpg"], "a folder of Pascal VOC"),
        (["data.yaml"], "a folder of YOLO"),
        ([f"{i}.json" for i in range(9)], "a folder of many json files, as LabelMe"),
        (["train.json"], "a folder, not COCO json; name the json in it: train.json"),
    ],
)
def test_folders_are_named(own, files, what):
    for name in files:
        (own.path / "folder").mkdir(exist_ok=True)
        (own.path / "folder" / name).touch()
    with pytest.raises(ConfigError, match=what):
        reading_of(own.path / "folder", own.images)
