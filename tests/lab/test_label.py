"""Pseudo-labels of a tiny teacher."""

import json
import shutil

import numpy as np
import pycocotools.mask as mask_util
import pytest
import tiny
import torch
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image

from sharedkd.data.coco import read_coco
from sharedkd.errors import ConfigError
from sharedkd.lab.label import label_images, thresholds_of

pytestmark = pytest.mark.filterwarnings("ignore")

THEIRS, OURS = ["ring", "cell", "star"], ["star", "moon", "cell"]
KEYS = ["data.classes=[ring,cell,star]", "data.test_short_edge=64"]
KEYS += ["data.name=label_of_test", "train.device=cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a teacher's weights, four images, and labels of the first one."""
    root = tmp_path_factory.mktemp("label")
    model = tiny.detector("mask_rcnn")
    torch.save({"model": model.state_dict()}, root / "teacher.pth")
    (root / "more/sub").mkdir(parents=True)
    for i in range(4):
        pixels = tiny.record(64, 96, seed=i)["image"].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / "more" / ("sub/" * (i % 2) + f"{i}.png"))
    square = [[8, 8, 40, 8, 40, 40, 8, 40]]
    box = dict(id=1, image_id=1, category_id=1, bbox=[8, 8, 32, 32], segmentation=square)
    labels = {
        "images": [dict(id=1, file_name="0.png", height=64, width=96)],
        "annotations": [{**box, "area": 1024, "iscrowd": 0}],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(OURS)],
    }
    (root / "labels.json").write_text(json.dumps(labels))
    return root, model.eval()


def by_hand(model, path):
    """(class name, score, box XYXY, mask) of each detection of the plain detector, run by hand."""
    model.roi_heads.box_predictor.test_score_thresh = 0.0
    image = np.array(Image.open(path))
    resized = ResizeShortestEdge(64, 480).get_transform(image).apply_image(image)
    pixels = torch.as_tensor(resized.transpose(2, 0, 1).copy())
    with torch.no_grad():
        found = model([dict(image=pixels, height=64, width=96)])[0]["instances"]
    fields = (found.pred_classes, found.scores, found.pred_boxes.tensor, found.pred_masks)
    return [(THEIRS[c], s.item(), b, m) for c, s, b, m in zip(*fields)]


def test_the_json_has_the_sure_detections_of_common_classes(place, capsys):
    root, model = place
    names = ("1", "2", "3")
    paths = {x: root / "more" / ("sub/" * (int(x) % 2) + f"{x}.png") for x in names}
    every = {x: by_hand(model, path) for x, path in paths.items()}
    scores = sorted(s for x in every.values() for name, s, _, _ in x if name == "cell")
    least = {"star": 0.0, "cell": (scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2}
    sure = {
        x: [y for y in found if y[0] in least and y[1] >= least[y[0]] and y[3].any()]
        for x, found in every.items()
    }
    assert 0 < sum(map(len, sure.values())) < sum(map(len, every.values()))
    code = tiny.run_tool(
        "label_images.py",
        *("--teacher", tiny.ROOT / "configs/custom_coco_mask_plain.py"),
        *("--teacher-weights", root / "teacher.pth", "--images", root / "more"),
        *("--output", root / "labels/pseudo.json", "--threshold", f"0,cell={least['cell']!r}"),
        *("--data-json", root / "labels.json", *KEYS),
    )
    said = capsys.readouterr().out
    assert not code
    assert "classes of the teacher that the data have not, left out: ring\n" in said
    assert "labels.json that the teacher does not know: moon\n" in said
    assert "1 of 4 images are trained on with their labels" in said
    written = json.loads((root / "labels/pseudo.json").read_text())
    assert [x["name"] for x in written["categories"]] == OURS
    files = {x["id"]: x["file_name"] for x in written["images"]}
    named = [str(paths[x].relative_to(root / "more")) for x in names if sure[x]]
    assert sorted(files.values()) == sorted(named) and len(named) < 3
    assert f"{3 - len(named)} images without a sure detection are left out" in said
    for image, name in files.items():
        rows = [x for x in written["annotations"] if x["image_id"] == image]
        wanted = sure[name[-5]]
        assert len(rows) == len(wanted)
        for row, (category, score, box, mask) in zip(rows, wanted):
            assert OURS[row["category_id"] - 1] == category
            assert row["score"] == pytest.approx(score, abs=1e-5)
            x, y, w, h = row["bbox"]
            assert [x, y, x + w, y + h] == pytest.approx(box.tolist(), abs=0.02)
            assert np.array_equal(mask_util.decode(row["segmentation"]), mask.numpy())
            assert row["area"] == mask.sum()

    # It trains beside the labels: classes by name, masks, no error.
    both = [str(root / x) for x in ("labels.json", "labels/pseudo.json")]
    data = read_coco(both, [str(root / "more")] * 2, "data.train_json", "data.train_images")
    assert not data.errors and data.classes == OURS and all(x.has_masks for x in data.files)
    assert sum(x.objects for x in data.files) == 1 + len(written["annotations"])


def test_a_labelled_image_is_left_out_under_any_name_of_its_file(place, tmp_path):
    """As training matches the names; else it would be trained on with labels of both kinds."""
    root, _ = place
    labels = json.loads((root / "labels.json").read_text())
    labels["images"][0]["file_name"] = r"C:\me\more\0.png"
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    config = str(tiny.ROOT / "configs/custom_coco_mask_plain.py")
    label_images(
        config,
        str(root / "more"),
        str(tmp_path / "out.json"),
        "0",
        str(root / "teacher.pth"),
        str(tmp_path / "labels.json"),
        overrides=KEYS,
    )
    written = json.loads((tmp_path / "out.json").read_text())
    assert "0.png" not in [x["file_name"] for x in written["images"]]


def test_an_image_that_cannot_be_loaded_is_left_out(place, tmp_path):
    root, _ = place
    shutil.copytree(root / "more", tmp_path / "more")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "more/cut.jpg")
    whole = (tmp_path / "more/cut.jpg").read_bytes()
    (tmp_path / "more/cut.jpg").write_bytes(whole[: len(whole) // 2])
    said, config = [], str(tiny.ROOT / "configs/custom_coco_mask_plain.py")
    place = (str(tmp_path / "more"), str(tmp_path / "out.json"))
    weights = str(root / "teacher.pth")
    found = label_images(config, *place, "0", weights, overrides=KEYS, say=said.append)
    assert found.unreadable == 1 and found.images + found.empty == 4
    assert any("cut.jpg: left out (OSError: image file is truncated" in x for x in said)


def test_what_cannot_be_labelled_is_refused(place, tmp_path):
    root, _ = place
    teacher = str(tiny.ROOT / "configs/custom_coco_mask_plain.py")

    def label(threshold="0.5", keys=KEYS, **options):
        images, output = str(root / "more"), str(tmp_path / "out.json")
        weights = str(root / "teacher.pth")
        label_images(teacher, images, output, threshold, weights, overrides=keys, **options)

    with pytest.raises(ConfigError, match="--threshold=1.0: no detection is as sure"):
        label("1.0")
    with pytest.raises(ConfigError, match="the names of its classes are unknown"):
        label(keys=KEYS[1:])
    other = tmp_path / "other.json"
    text = (root / "labels.json").read_text()
    other.write_text(text.replace("star", "sun").replace("cell", "tree"))
    with pytest.raises(ConfigError, match="none of the data's classes: ring, cell, star, not sun"):
        label(data_json=str(other))
    with pytest.raises(ConfigError, match="--data-json=.*: cannot be read"):
        label(data_json=str(tmp_path / "gone.json"))
    assert not (tmp_path / "out.json").exists()


def test_thresholds():
    assert thresholds_of("0.6,cat=0.7", ["cat", "dog"]) == {"cat": 0.7, "dog": 0.6}
    assert thresholds_of("cat=0.7", ["cat", "dog"]) == {"cat": 0.7, "dog": 0.5}
    for text in ("cow=0.5", "1.5", "much"):
        with pytest.raises(ConfigError, match="--threshold="):
            thresholds_of(text, ["cat", "dog"])
