"""The length of a run, in iterations or in epochs of its own data."""

import pytest
from coco_files import Folder
from detectron2.config import LazyConfig
from omegaconf import OmegaConf

from sharedkd.config import load_config
from sharedkd.config.length import settle_length
from sharedkd.errors import ConfigError

CONFIG = "configs/custom_coco_plain.py"


def settled(images, **train):
    given = {"max_iter": None, "epochs": None, "eval_period": None, "accumulate": 1}
    cfg = {"train": {**given, "checkpointer": {"period": 7}, **train}}
    cfg = OmegaConf.create({**cfg, "dataloader": {"train": {"total_batch_size": 4}}})
    settle_length(cfg, images)
    return cfg.train


def test_epochs_become_the_iterations_that_they_take():
    assert settled(images=272, epochs=50).max_iter == 3400  # 50 * 272 / 4
    assert settled(images=272, epochs=50, accumulate=2).max_iter == 1700
    assert settled(images=3, epochs=0.1).max_iter == 1
    assert settled(images=272, epochs=50).epochs is None  # a saved config has one length


def test_open_periods_are_a_tenth_of_the_run():
    assert settled(images=272, epochs=50).eval_period == 340
    assert settled(images=272, epochs=50).checkpointer.period == 7
    assert settled(images=None, max_iter=50).eval_period == 100


def own(path):
    """Overrides that name 4 images, of which a batch of the configs for own data has 4."""
    folder = Folder(path)
    data = [f"data.{split}_json={folder.write()}" for split in ("train", "val")]
    return data + [f"data.{split}_images={folder.images}" for split in ("train", "val")]


def test_of_two_lengths_the_later_override_counts(tmp_path):
    data = own(tmp_path)

    def max_iter(*overrides):
        return load_config(CONFIG, [*data, *overrides]).train.max_iter

    assert max_iter() == 50  # 50 epochs of 4 images, 4 a step
    assert max_iter("train.max_iter=7") == 7
    assert max_iter("train.max_iter=7", "train.epochs=3") == 3
    assert max_iter("train.epochs=3", "train.max_iter=7") == 7
    assert (
        load_config("configs/faster_rcnn_plain.py", [*data, "train.epochs=3"]).train.max_iter == 1
    )


def test_epochs_of_a_config_without_max_iter_are_not_beside_its_default(tmp_path):
    cfg = LazyConfig.load(CONFIG)
    del cfg.train.max_iter
    cfg.train.epochs = 3
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    saved = load_config(str(tmp_path / "config.yaml"), own(tmp_path))
    assert saved.train.max_iter == 3


@pytest.mark.parametrize(
    "images, train, message",
    [
        (None, dict(epochs=2), r"train.epochs=2: is for own data, .* use train.max_iter"),
        (9, dict(epochs=2, max_iter=5), r"train.epochs=2: and train.max_iter=5 are both"),
        (9, dict(), r"train.max_iter=None: the run has no length"),
    ],
)
def test_a_length_that_cannot_be_known_is_refused(images, train, message):
    with pytest.raises(ConfigError, match=message):
        settled(images, **train)
