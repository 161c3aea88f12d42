"""Class names of models that were trained elsewhere."""

import itertools
import json

import pytest
from detectron2.config import get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import OmegaConf
from PIL import Image

from sharedkd.config import load_config
from sharedkd.config.own_data import class_names, reading_of
from sharedkd.errors import Findings


def test_class_names_of_a_config(tmp_path):
    path = tmp_path / "train.json"
    rows = [{"id": 2, "name": "red"}, {"id": 1, "name": "green"}]
    picture = {"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}
    path.write_text(json.dumps({"images": [picture], "annotations": [], "categories": rows}))
    assert class_names(OmegaConf.create({"data": {"train_json": str(path)}})) == ["green", "red"]
    saved = {"classes": ["red", "green"], "train_json": str(path)}
    assert class_names(OmegaConf.create({"data": saved})) == ["red", "green"]
    names = {"dataloader": {"train": {"dataset": {"names": "coco_2017_train"}}}}
    assert (
        class_names(OmegaConf.create(names)) == MetadataCatalog.get("coco_2017_train").thing_classes
    )
    assert class_names(OmegaConf.create({"data": {"train_json": "gone.json"}})) is None
    both = {"data": {"train_json": [str(path), str(path)]}}
    assert class_names(OmegaConf.create(both)) == ["green", "red"]
    classic = get_cfg()
    assert class_names(classic) is None
    classic.DATASETS.TRAIN = ("coco_2017_train",)
    assert len(class_names(classic)) == 80


def test_how_a_run_reads_its_images_is_what_its_mapper_does():
    def read(mapper, **more):
        node = {"mapper": {"_target_": mapper, "use_instance_mask": False, **more}}
        findings = Findings()
        found = reading_of(
            OmegaConf.create({"dataloader": {"train": node, "test": node}}), "val", findings
        )
        return found.scales, found.image_range, len(findings.errors), found.masks

    ours = "sharedkd.data.images.ImageMapper"
    assert read(ours, image_range=[0, 9]) == (True, [0, 9], 0, False)
    assert read(ours, image_range=[9, 0]) == (True, None, 1, False)
    assert read("detectron2.data.DatasetMapper")[0] is False
    assert read("tiny.record")[0] is None  # which may read images of any depth in a way of its own


@pytest.mark.parametrize("name", ["faster_rcnn_R_50_FPN_1x.yaml", "retinanet_R_50_FPN_1x.py"])
def test_images_without_labels_beside_registered_data(name, tmp_path):
    """With --teacher on any config, whose own data sets stay; the labelled one is left out by name."""
    for i in range(2):
        Image.new("RGB", (60, 40)).save(tmp_path / f"{i}.png")
    box = dict(bbox=[5, 5, 20, 20], bbox_mode=0, category_id=0, iscrowd=0)
    image = dict(file_name=str(tmp_path / "0.png"), image_id=0, height=40, width=60)
    records = [{**image, "annotations": [box]}]
    DatasetCatalog.register("beside_train", lambda: records)
    try:
        names = [f"{key}={value}" for key, value in {
            "dataloader.train.dataset.names": "beside_train",
            "dataloader.train.num_workers": 0,
            "DATASETS.TRAIN": "[beside_train]",
            "DATALOADER.NUM_WORKERS": 0,
        }.items() if key.isupper() == name.endswith("yaml")]  # fmt: skip
        cfg = load_config(
            f"COCO-Detection/{name}",
            [
                "distill.teacher=any.yaml",
                f"data.unlabelled_images={tmp_path}",
                "train.seed=1",
                *names,
            ],
        )
        assert cfg.dataloader.train.dataset.names in ("beside_train", ["beside_train"])
        assert cfg.data.train_json is None and cfg.data.max_size == 1333
        node = cfg.dataloader.train
        found = instantiate(node.unlabelled)
        assert [x["file_name"] for x in found] == [str(tmp_path / "1.png")]
        (batch,) = itertools.islice(instantiate({**node, "total_batch_size": 1}), 1)
        assert ["instances" in x for x in batch] == [True, False] and batch[1]["unlabelled"]
    finally:
        DatasetCatalog.remove("beside_train")
