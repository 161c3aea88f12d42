"""The benchmark measures what it says it does.  Nothing here depends on how fast the machine is."""

import json
import subprocess
import sys

import pytest
import tiny
import torch
from detectron2.engine import SimpleTrainer
from detectron2.layers import Conv2d

from sharedkd import ConfigError
from sharedkd.config import load_config
from sharedkd.methods import with_method
from sharedkd.speed.benchmark import Benchmark, ratio

QUICKSTART = str(tiny.ROOT / "configs/quickstart/sharedkd.py")
SETTINGS = ["train.device=cpu", "train.amp.enabled=False"]


@pytest.fixture(scope="module")
def bench():
    cfg = load_config(QUICKSTART, SETTINGS, without_data=True)
    methods = {"fgd": with_method(cfg, "fgd", tiny.ROOT / "configs/common/methods")}
    return Benchmark(cfg, methods, image_size=64, batch_size=1)


def test_every_arm_does_its_work_in_every_round(bench):
    seconds = bench.times(bench.arms(), rounds=2)
    assert list(seconds) == [
        *("student", "teacher_eager", "student_sharedkd", "teacher", "distill", "fgd"),
        *("losses/distill", "losses/fgd", "copies"),
    ]
    assert all(len(x) == 2 and min(x) > 0 for x in seconds.values())


def test_parts_add_up_to_a_step(bench):
    parts = bench.parts(rounds=2)
    whole = parts.pop("whole")
    assert set(parts) == {
        *("data", "teacher", "student_forward", "losses", "backward", "optimizer", "rest"),
    }
    assert all(
        x >= 0 for x in parts.values()
    )  # what is counted twice would leave less than nothing
    assert max(parts.values()) < whole


def test_measuring_leaves_the_student_as_it_is(bench):
    before = {k: v.clone() for k, v in bench.student.named_parameters()}
    bench.arm("distill")()
    assert all(torch.equal(v, before[k]) for k, v in bench.student.named_parameters())


def test_the_plain_student_is_detectron2s(bench):
    trainer = bench.arm("student").trainer
    assert type(trainer) is SimpleTrainer
    convs = [m for m in trainer.model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(type(m) in (Conv2d, torch.nn.Conv2d) for m in convs)
    assert all(m.weight.is_contiguous() for m in convs)


def test_the_eager_teacher_is_not_the_prepared_one(bench):
    norms = [
        sum(isinstance(m, torch.nn.BatchNorm2d) for m in t.model.backbone.modules())
        for t in (bench._eager, bench.teacher)
    ]
    assert norms[0] > 50 and norms[1] == 0


def test_ratios_are_taken_within_a_round():
    seconds = {"a": [3.0, 30.0, 8.0], "b": [1.0, 10.0, 2.0], "c": [2.0, 20.0, 2.0]}
    assert ratio(seconds, "a", "b", "c") == {"median": 1.0, "low": 1.0, "high": 2.0}


def test_a_plain_detector_is_no_pair():
    cfg = load_config(str(tiny.ROOT / "configs/quickstart/plain.py"), SETTINGS, without_data=True)
    with pytest.raises(ConfigError, match="use a pair's config"):
        Benchmark(cfg, {}, 64, 1)


def test_command_line(tmp_path):
    command = [
        *(sys.executable, str(tiny.ROOT / "tools/benchmark.py"), "--config-file", QUICKSTART),
        *("--image-size", "64", "--batch-size", "1", "--rounds", "1", "--growth"),
        *("--starts", "1"),
        *("--processes", "2", "--variant", "train.channels_last=False"),
        *("--json", str(tmp_path / "deeper/out.json"), "train.amp.enabled=False"),
        "train.keep_memory=False",  # no process for Detectron2's arms
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "deeper/out.json").read_text())
    assert found["overhead"] == found["ratios"]["overhead"]["median"] > 0
    seconds = found["seconds"]
    assert found["overhead"] == pytest.approx(
        seconds["distill"]["median"]
        / (seconds["student"]["median"] + seconds["teacher_eager"]["median"])
    )
    assert found["images"] == [[64, 96]] and found["teacher_precision"] == "float32"
    assert max(found["teacher_deviation"].values()) < 1e-5
    variant = "train.channels_last=False"
    assert found["memory"]["peak_mb"].keys() == {
        *("student", "student_sharedkd", "distill", variant),
    }
    assert found["ratios"][variant]["median"] == pytest.approx(
        seconds[variant]["median"] / seconds["distill"]["median"]
    )
    assert [(x["batch_size"], x["image_size"], x["levels"]) for x in found["growth"]] == [
        *((1, 64, 5), (2, 64, 5), (1, 96, 5)),
        *((1, 64, 2), (1, 64, 3), (1, 64, 4)),
    ]
    assert found["efficiency"].keys() == {"student_sharedkd", "distill"}
    assert found["memory"]["teacher_maps_mb"] == pytest.approx(
        64 * 4 * sum(64 * 96 / s**2 for s in (4, 8, 16, 32)) / 2**20
        + 64 * 4 * 2 / 2**20  # the level of stride 64
    )
    assert sum(found["operations"].values()) == pytest.approx(1)
    assert min(found["operations"].values()) > 0  # also RoIAlign and matrix products
    student_maps = sum(64 * 96 / s**2 for s in (4, 8, 16, 32)) * 64 * 4 / 2**20
    assert found["memory"]["gradients_mb"] > student_maps
    assert "overhead: " in done.stdout and "| distill" in done.stdout
