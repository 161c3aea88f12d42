"""One tiny data set and one tiny teacher for the whole-run tests."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import arguments

from sharedkd.engine.run import run
from sharedkd.lab.shapes import CLASSES, make_shapes


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Drawn shapes, a teacher's config and weights, and the overrides that make a config tiny."""
    root = tmp_path_factory.mktemp("workspace")
    shapes = make_shapes(root / "shapes", train=12, val=4, size=(64, 64))
    weights = root / "teacher.pth"
    teacher = tiny.detector("mask_rcnn", 18, num_classes=len(CLASSES), seed=7)
    torch.save({"model": teacher.state_dict()}, weights)
    data = [
        f"data.train_json={shapes}/train.json",
        f"data.val_json={shapes}/val.json",
        f"data.train_images={shapes}/train",
        f"data.val_images={shapes}/val",
        "data.short_edge=[64]",
        "data.test_short_edge=64",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
        "train.device=cpu",
        "train.log_period=1",
        "train.max_iter=4",
        "train.eval_period=0",
        "train.eval_teacher=False",
        "train.checkpointer.period=100",
    ]
    config = root / "teacher.py"
    config.write_text(
        f"import sys; sys.path.insert(0, {str(tiny.ROOT / 'tests')!r})\n"
        f"import tiny\nmodel = tiny.node('mask_rcnn', 18, {len(CLASSES)})\n"
    )
    pair = [f"model.teacher.config={config}", f"model.teacher.weights={weights}"]
    flags = [f"distill.teacher={config}", f"distill.weights={weights}"]
    return SimpleNamespace(
        root=root, shapes=shapes, data=data, pair=pair, flags=flags, weights=weights
    )


@pytest.fixture
def train(workspace, tmp_path):
    """Train a shipped config on the tiny data; returns (output folder, results)."""

    def train(config, *opts, output=None, flags=()):
        output = output or tmp_path / "run"
        pair = workspace.pair if "plain" not in config and "teacher" not in config else []
        opts = [*workspace.data, *pair, f"train.output_dir={output}", *opts]
        return output, run(arguments(config, *opts, flags=flags))

    return train
