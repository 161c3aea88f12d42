"""The names of classes of models that were trained elsewhere."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from sharedkd.errors import ConfigError
from sharedkd.modeling.classes import check_class_names, registered_classes


def test_other_orders_are_refused():
    check_class_names("k", "v", ["red", "green"], ("red", "green"))
    with pytest.raises(
        ConfigError, match="k=v: .* red, green, the data have green, red: in another order"
    ):
        check_class_names("k", "v", ["red", "green"], ["green", "red"])
    with pytest.raises(ConfigError, match="with other names"):
        check_class_names("k", "v", ["red", "green"], ["green", "blue"])


def test_a_registered_json_tells_its_classes_before_it_is_loaded(tmp_path):
    """Detectron2 sets them when the data are loaded, after the model was built."""
    path = tmp_path / "train.json"
    categories = [{"id": 7, "name": "red"}, {"id": 2, "name": "green"}]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    register_coco_instances("classes_of_json", {}, str(path), str(tmp_path))
    try:
        assert registered_classes(["classes_of_json"]) is None
        assert registered_classes(["classes_of_json"], unloaded=True) == ["green", "red"]
        DatasetCatalog.get("classes_of_json")
        assert MetadataCatalog.get("classes_of_json").thing_classes == ["green", "red"]
        assert registered_classes(["unknown"], unloaded=True) is None
        MetadataCatalog.remove("classes_of_json")
        MetadataCatalog.get("classes_of_json").set(json_file=str(path), evaluator_type="coco")
        path.write_text("{")
        assert registered_classes(["classes_of_json"], unloaded=True) is None
    finally:
        DatasetCatalog.remove("classes_of_json")
        MetadataCatalog.remove("classes_of_json")
