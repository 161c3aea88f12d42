"""Class names of models that were trained elsewhere."""

import json

import pytest
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from omegaconf import OmegaConf

from sharedkd.config.own_data import check_class_names, class_names, reading_of
from sharedkd.errors import ConfigError, Findings


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


def test_other_orders_are_refused():
    check_class_names("k", "v", ["red", "green"], ("red", "green"))
    with pytest.raises(
        ConfigError, match="k=v: .* red, green, the data have green, red: in another order"
    ):
        check_class_names("k", "v", ["red", "green"], ["green", "red"])
    with pytest.raises(ConfigError, match="with other names"):
        check_class_names("k", "v", ["red", "green"], ["green", "blue"])


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
