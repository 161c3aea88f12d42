"""Own data as its tools wrote them, through whole runs from the command line's settings."""

import json
import pickle
import re

import numpy as np
import pytest
import tiny
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog
from omegaconf import OmegaConf
from PIL import Image

from sharedkd import ConfigError
from sharedkd.config.own_data import class_names
from sharedkd.engine.run import run
from sharedkd.lab.preflight import preflight
from sharedkd.lab.shapes import CLASSES
from sharedkd.losses import DKD


def part(workspace, folder, name, images, change=lambda data: None):
    data = json.loads((workspace.shapes / "train.json").read_text())
    data["images"] = [i for i in data["images"] if i["id"] in images]
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in images]
    for i, annotation in enumerate(data["annotations"]):
        annotation["id"] = i
    change(data)
    (folder / name).write_text(json.dumps(data))
    return folder / name


def test_two_repaired_files_train_and_are_evaluated_on(train, workspace, tmp_path):
    first = part(workspace, tmp_path, "a b.json", range(1, 7))
    second = part(workspace, tmp_path, "b.json", range(7, 13))
    files = f'["{first}",{second}]'
    opts = [
        f"data.train_json={files}",
        f"data.val_json={files}",
        f"data.val_images={workspace.shapes}/train",
    ]
    output, results = train("custom_coco_mask_plain.py", *opts, "train.max_iter=2")
    assert len(DatasetCatalog.get("own_train")) == 12
    assert set(results) == {"bbox", "segm"} and np.isfinite(results["bbox"]["AP"])
    log = (output / "log.txt").read_text()
    assert log.count("annotation ids are 0, text, repeated or missing (id 0): numbered from 1") == 4
    saved = LazyConfig.load(str(output / "config.yaml"))
    assert class_names(saved) == list(CLASSES)


def test_what_preflight_says_of_repaired_data(workspace, tmp_path):
    def change(data):
        data["annotations"][0]["bbox"][0] -= 99
        data["annotations"][0]["bbox"][2] += 99

    path = part(workspace, tmp_path, "train.json", range(1, 13), change)
    opts = [*workspace.data, f"data.train_json={path}", f"train.output_dir={tmp_path}/run"]
    names = "dataloader.train.dataset.names=[own_train,own_val]"
    found = preflight(
        "configs/custom_coco_plain.py", [*opts, names, "train.max_iter=8"], measure=False
    )
    assert found["ok"]
    assert found["data"]["train"]["images"] == 16 and found["data"]["train"]["repaired"] == 2
    said = [w["message"] for w in found["warnings"] if w["key"].startswith("data.")]
    assert len(said) == 3 and "is also the training data" in said[2]
    assert "boxes reached over their image's edge (" in said[1] and "clipped" in said[1]
    strict = preflight("configs/custom_coco_plain.py", [*opts, "data.repair=False"], measure=False)
    assert [e["key"] for e in strict["errors"]] == ["data.train_json"] * 2


def test_deep_images_are_scaled_in_a_run(train, workspace, tmp_path):
    """Twelve bits in sixteen: of the whole range the model would get 0 to 15."""
    data = json.loads((workspace.shapes / "train.json").read_text())
    for image in data["images"]:
        with Image.open(workspace.shapes / "train" / image["file_name"]) as picture:
            grey = np.asarray(picture.convert("L")).astype(np.uint16) * 16
        image["file_name"] = f"{image['id']}.png"
        Image.fromarray(grey).save(tmp_path / image["file_name"])
    (tmp_path / "train.json").write_text(json.dumps(data))
    files = [f"data.train_json={tmp_path}/train.json", f"data.train_images={tmp_path}"]
    output, _ = train(
        "custom_coco_plain.py", *files, "data.image_range=[0,4080]", "train.max_iter=1"
    )
    assert "images of mode I;16: 0 to 4080 become 0 to 255" in (output / "log.txt").read_text()


def test_classes_in_another_order_are_refused_where_scores_are_read(workspace, tmp_path):
    """For an inherited head, for methods of class scores, and in an evaluation; not for feature maps."""
    node = tiny.node("mask_rcnn", 18, len(CLASSES))
    saved = OmegaConf.create({"model": node, "data": {"classes": list(reversed(CLASSES))}})
    LazyConfig.save(saved, str(tmp_path / "config.yaml"))
    pair = [*workspace.data, *workspace.pair, f"model.teacher.config={tmp_path}/config.yaml"]
    pair.append(f"train.output_dir={tmp_path}/run")

    def errors(config, *overrides):
        found = preflight(str(tiny.ROOT / config), [*pair, *overrides], measure=False)
        return [e for e in found["errors"] if "in another order" in e["message"]]

    assert not errors("configs/custom_coco.py", "train.inherit=[neck]")
    (error,) = errors("configs/custom_coco.py")
    assert "set train.inherit=[neck]" in error["message"]
    assert error["key"] == "model.teacher.config"
    for names in (CLASSES, list(reversed(CLASSES))):
        assert ", ".join(names) in error["message"]
    scores = LazyConfig.load(str(tiny.ROOT / "configs/custom_coco.py"))
    scores.model.stages.identical.loss = L(DKD)(alpha=1.0, beta=1.0)
    LazyConfig.save(scores, str(tmp_path / "scores.yaml"))
    assert errors(tmp_path / "scores.yaml")

    weights = tmp_path / "model_final.pth"
    torch.save({"model": tiny.detector("mask_rcnn", 18, len(CLASSES)).state_dict()}, weights)
    args = tiny.arguments(
        "custom_coco_mask_plain.py",
        *workspace.data,
        f"train.init_checkpoint={weights}",
        flags=["--eval-only"],
    )
    with pytest.raises(ConfigError, match="train.init_checkpoint=.*in another order"):
        run(args)
    opts = [*args.opts, f"train.output_dir={tmp_path}/run"]
    found = preflight(str(tiny.ROOT / "configs/custom_coco_mask_plain.py"), opts, measure=False)
    (warning,) = [w for w in found["warnings"] if w["key"] == "train.init_checkpoint"]
    assert found["ok"] and "in another order" in warning["problem"]


CAFFE2 = {
    "stem.conv1.weight": "conv1_w",
    "stem.conv1.norm.weight": "res_conv1_bn_s",
    "stem.conv1.norm.bias": "res_conv1_bn_b",
}
BRANCHES = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
KINDS = {"weight": "w", "norm.weight": "bn_s", "norm.bias": "bn_b"}


def caffe2(name):
    """The name that Detectron2's R-50.pkl has for a tensor of a ResNet."""
    if name in CAFFE2:
        return CAFFE2[name]
    stage, block, layer, kind = name.split(".", 3)
    return f"{stage}_{block}_{BRANCHES[layer]}_{KINDS[kind]}"


def test_a_backbone_of_another_convention_is_named_with_the_keys_to_set(workspace, tmp_path):
    def said(depth, author, *settings, config=None):
        """Warnings about such a file, as the start of a pair's student or, of depth 50, of a teacher."""
        state = tiny.detector("faster_rcnn", depth).backbone.bottom_up.state_dict()
        state = {k: x.numpy() for k, x in state.items() if "running" not in k and "num_b" not in k}
        if author == "Caffe2":
            state = {caffe2(name): x for name, x in state.items()}
        data = {"model": state, "__author__": author, "matching_heuristics": True}
        (tmp_path / "weights.pkl").write_bytes(pickle.dumps(data))
        opts = [*workspace.data, f"train.init_checkpoint={tmp_path}/weights.pkl", *settings]
        opts += [f"train.output_dir={tmp_path}/run", *(workspace.pair if depth == 18 else ())]
        if config:
            opts = [x for x in opts if not re.match(r"data\.\w+(edge|size)=", x)]
        lazy = "configs/custom_coco.py" if depth == 18 else "configs/custom_coco_teacher.py"
        found = preflight(config or str(tiny.ROOT / lazy), opts, measure=False)
        assert found["ok"], found["errors"]
        return [w for w in found["warnings"] if w["key"] == "train.init_checkpoint"]

    def keys(warning):
        return warning["fix"].removeprefix("set ").partition(", or use")[0].split()

    assert not said(50, "torchvision")
    (warning,) = said(50, "Caffe2")
    has = "Caffe2's convention (BGR images, the stride in the 1x1 convolution, pixel_std [1,1,1])"
    assert has in warning["problem"]
    settings = keys(warning)
    assert len(settings) == 5 and not said(50, "Caffe2", *settings)
    (warning,) = said(50, "torchvision", *settings)
    assert "torchvision's convention (RGB images, the stride in the 3x3" in warning["problem"]
    pair = [x.replace("model.", "model.student.") for x in settings if "stride" not in x]
    (warning,) = said(18, "torchvision", *pair)
    back = keys(warning)
    assert [x.partition("=")[0] for x in back] == [x.partition("=")[0] for x in pair]
    assert not said(18, "torchvision", *back)
    yaml = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"  # made for Caffe2's
    (warning,) = said(50, "torchvision", config=yaml)
    assert not said(50, "torchvision", *keys(warning), config=yaml)
