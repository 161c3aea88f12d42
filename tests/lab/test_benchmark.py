"""The benchmark measures what it says it does.  Nothing here depends on how fast the machine is."""

import json
import subprocess
import sys
import time

import pytest
import tiny
import torch
from detectron2.engine import SimpleTrainer
from detectron2.layers import Conv2d

from sharedkd import ConfigError
from sharedkd.config import load_config
from sharedkd.lab.benchmark import Benchmark, growth, ratio
from sharedkd.losses.identical_layer import IdenticalLayer
from sharedkd.methods import with_method
from sharedkd.modeling.teachers.frozen import FrozenTeacher

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
    assert min(parts.values()) > 0  # counted twice, something would leave less than nothing
    assert sum(parts.values()) == pytest.approx(whole)


def test_a_part_takes_what_it_takes(bench, monkeypatch):
    def slower(work):
        def run(*args, **kwargs):
            time.sleep(0.3)
            return work(*args, **kwargs)

        return run

    monkeypatch.setattr(FrozenTeacher, "features", slower(FrozenTeacher.features))
    monkeypatch.setattr(IdenticalLayer, "forward", slower(IdenticalLayer.forward))
    parts = bench.parts(rounds=1)
    assert parts["teacher"] > 0.3 and parts["losses"] > 0.3
    assert min(parts.values()) > 0 and parts["whole"] > parts["teacher"] + parts["losses"]


def test_losses_are_profiled_by_themselves(bench):
    found = bench.loss_operations()
    assert found["calls"] > 100 and not any("convolution" in name for name in found["shares"])
    shares = list(found["shares"].values())
    assert shares == sorted(shares, reverse=True) and 0.5 < sum(shares) <= 1


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


def test_growth(monkeypatch):
    """Each case by itself; peaks, which take a process each, are made up."""
    cfg = load_config(QUICKSTART, SETTINGS, without_data=True)
    sizes = {}

    def peaks(bench, name, starts):
        strides = len(bench.cfg.model.stages.identical.loss.strides or ())
        sizes.setdefault((len(bench.records), bench.image_size, strides), []).append(name)
        return [100.0 if name == "distill" else 60.0] * starts

    monkeypatch.setattr(Benchmark, "peaks", peaks)
    found = growth(Benchmark(cfg, {}, 64, 1), rounds=1)
    assert [(x["batch_size"], x["image_size"], x["levels"]) for x in found] == [
        *((1, 64, 5), (2, 64, 5), (1, 96, 5)),
        *((1, 64, 2), (1, 64, 3), (1, 64, 4)),
    ]
    for case in found:
        seconds = case["seconds"]
        plain = seconds["student"] + seconds["teacher_eager"]
        assert case["overhead"] == pytest.approx(seconds["distill"] / plain)
        assert case["over_student_mb"] == 40.0
    assert list(sizes) == [
        *((1, 64, 0), (2, 64, 0), (1, 96, 0)),
        *((1, 64, 2), (1, 64, 3), (1, 64, 4)),
    ]
    assert all(names == ["student_sharedkd", "distill"] for names in sizes.values())


def test_command_line(tmp_path):
    command = [
        *(sys.executable, str(tiny.ROOT / "tools/benchmark.py"), "--config-file", QUICKSTART),
        *("--image-size", "64", "--batch-size", "1", "--rounds", "1"),
        *("--starts", "1"),
        *("--processes", "2", "--variant", "train.channels_last=False"),
        *("--json", str(tmp_path / "deeper/out.json"), "train.amp.enabled=False"),
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
    assert found["memory"]["starts_mb"].keys() == {"student", "student_sharedkd", "distill"}
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
