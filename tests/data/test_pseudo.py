"""Images with pseudo-labels: known by their json, and drawn as often as their weight says."""

import itertools
from collections import Counter

import pytest
import tiny
from coco_files import NAME
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog

from sharedkd.config import load_config
from sharedkd.data.coco import read_coco
from sharedkd.data.loader import build_train_loader
from sharedkd.errors import ConfigError


def test_images_of_a_json_by_a_teacher_are_marked(own):
    """Not those that a person has labelled, too."""

    def labels(data):
        data["images"] = [x for x in data["images"] if x["id"] in (7, 3)]
        data["annotations"] = [x for x in data["annotations"] if x["image_id"] in (7, 3)]

    def pseudo(data):
        data["info"] = {"pseudo_labels": True}
        data["images"] = [x for x in data["images"] if x["id"] != 3]
        data["annotations"] = [x for x in data["annotations"] if x["image_id"] != 3]

    files = [str(own.write(labels, "a.json")), str(own.write(pseudo, "b.json"))]
    for some in (files, files[::-1]):
        read_coco(some, [str(own.images)] * 2, "train", "images").register(NAME)
        marked = {
            x["file_name"].rsplit("/", 1)[1]: x.get("pseudo_labels")
            for x in DatasetCatalog.get(NAME)
        }
        assert marked == {"a.png": None, "ünï 図.jpg": None, "many.png": True, "empty.png": True}
    read_coco(files[:1], [str(own.images)], "train", "images").register(NAME)
    assert not any("pseudo_labels" in x for x in DatasetCatalog.get(NAME))


def test_a_weight_is_how_often_they_are_drawn():
    records = [dict(image_id=i, **({"pseudo_labels": True} if i < 4 else {})) for i in range(10)]

    def drawn(weight, batches):
        loader = build_train_loader(
            records,
            mapper=lambda x: x["image_id"],
            total_batch_size=1,
            seed=1,
            pseudo_weight=weight,
        )
        return Counter(x for batch in itertools.islice(loader, batches) for x in batch)

    assert drawn(2.0, 3 * 14) == {i: 6 if i < 4 else 3 for i in range(10)}
    found = drawn(0.25, 1400)  # 7 an epoch on average
    assert all(found[i] == pytest.approx(50 if i < 4 else 200, abs=20) for i in range(10))
    with pytest.raises(ConfigError, match="pseudo_weight=0: is too small"):
        drawn(0, 1)


def test_the_key_needs_a_json_by_a_teacher_and_reaches_the_loader(own):
    keys = [f"data.{split}_images={own.images}" for split in ("train", "val")]
    keys += [f"data.val_json={own.write()}", f"data.name={NAME}", "data.pseudo_weight=0.5"]

    def load(change):
        path = own.write(change, "train.json")
        config = str(tiny.ROOT / "configs/custom_coco_plain.py")
        return load_config(config, [*keys, f"data.train_json={path}"])

    loader = load(lambda data: data.update(info={"pseudo_labels": True})).dataloader.train
    assert loader.pseudo_weight == 0.5
    assert list(instantiate(loader).repeats) == [0.5] * 4
    with pytest.raises(
        ConfigError, match="data.pseudo_weight=0.5: no json of data.train_json is by"
    ):
        load(None)
