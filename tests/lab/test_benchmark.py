"""The benchmark measures what it says it does.  Nothing here depends on how fast the machine is."""

import functools
import json
import subprocess
import sys

import pytest
import tiny
import torch
from detectron2.config import LazyCall as L
from detectron2.engine import SimpleTrainer

from sharedkd import ConfigError
from sharedkd.config import load_config
from sharedkd.lab import benchmark, timing
from sharedkd.lab.benchmark import Benchmark, ratio
from sharedkd.methods import with_method
from sharedkd.modeling.teachers import StudentAverage

QUICKSTART = str(tiny.ROOT / "configs/quickstart/sharedkd.py")
SETTINGS = ["train.device=cpu", "train.amp.enabled=False"]


@pytest.fixture(scope="module")
def bench():
    cfg = load_config(QUICKSTART, SETTINGS, without_data=True)
    return Benchmark(cfg, image_size=64, batch_size=1)


def test_arms_take_turns_and_each_round_begins_with_another(monkeypatch):
    calls, clock = [], iter(range(1000))
    monkeypatch.setattr(timing, "_now", lambda: float(next(clock)))
    arms = {name: functools.partial(calls.append, name) for name in "abc"}
    seconds = timing.take_turns(arms, rounds=3, warm_up=2)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds == ["bca", "cab", "abc", "bca", "cab"]  # the first two warm up
    assert seconds == {name: [1.0] * 3 for name in "abc"}


def test_ratios_are_taken_within_a_round():
    seconds = {"a": [3.0, 30.0, 8.0], "b": [1.0, 10.0, 2.0], "c": [2.0, 20.0, 2.0]}
    assert ratio(seconds, "a", "b", "c") == {"median": 1.0, "low": 1.0, "high": 2.0}
    assert ratio(seconds, "a", "c", minus="b") == {"median": 1.0, "low": 1.0, "high": 3.0}


def test_the_plain_student_is_detectron2s(bench, monkeypatch):
    trainers = []
    monkeypatch.setattr(benchmark, "_one_step", lambda trainer, _: trainers.append(trainer))
    bench.student()()
    (trainer,) = trainers
    assert type(trainer) is SimpleTrainer
    assert all(p.is_contiguous() for p in trainer.model.parameters())


def test_the_eager_teacher_is_not_the_prepared_one(bench):
    def norms(teacher):
        modules = teacher.model.backbone.modules()
        return sum(isinstance(x, torch.nn.BatchNorm2d) for x in modules)

    assert norms(bench._new_teacher()) > 50 and norms(bench.prepared) == 0


def test_a_step_runs_every_loss_of_a_stage_that_starts_late_and_leaves_the_student():
    cfg = load_config(QUICKSTART, SETTINGS, without_data=True)
    for stage in ("identical", "cross"):
        cfg.model.stages[stage].update(start=0.5, weight=1.0)
    bench = Benchmark(cfg, image_size=64, batch_size=1)
    pair = bench.pair
    before = [p.clone() for p in pair.student.parameters()]
    calls = []
    for name, loss in pair.losses.items():
        loss.register_forward_hook(lambda *_, name=name: calls.append(name))
    bench.distill()()
    assert calls == ["identical", "cross"]
    assert all(map(torch.equal, pair.student.parameters(), before))


def test_the_arm_of_the_losses_computes_them_alone(bench):
    arm, seen = bench.losses(), []
    hook = bench.pair.student.register_forward_hook(lambda *_: seen.append("student"))
    with torch.profiler.profile() as found:
        arm()
    hook.remove()
    names = {each.key for each in found.key_averages()}
    assert not seen and "_StandardisedMSEBackward" in names
    assert not any("convolution" in name for name in names)


def test_losses_that_go_through_the_teachers_head_can_be_timed_again_and_again():
    cfg = with_method(load_config(QUICKSTART, SETTINGS, without_data=True), "crosskd")
    arm = Benchmark(cfg, image_size=64, batch_size=1).losses()
    arm()
    arm()


def test_a_plain_detector_is_no_pair():
    cfg = load_config(str(tiny.ROOT / "configs/quickstart/plain.py"), SETTINGS, without_data=True)
    with pytest.raises(ConfigError, match="use a pair's config"):
        Benchmark(cfg, 64, 1)


def test_a_pair_without_a_frozen_teacher_has_no_overhead(bench):
    cfg = bench.cfg.copy()
    cfg.model.teacher = L(StudentAverage)()
    with pytest.raises(ConfigError, match="model.teacher: is no frozen teacher.*--schemes"):
        benchmark.measure(Benchmark(cfg, 64, 1), {}, {}, 1, 1)


@pytest.mark.nightly
def test_command_line(tmp_path):
    variant = "train.channels_last=False"
    command = [
        *(sys.executable, str(tiny.ROOT / "tools/benchmark.py"), "--config-file", QUICKSTART),
        *("--image-size", "64", "--batch-size", "1", "--rounds", "1", "--starts", "1"),
        *("--methods", "fgd", "--variant", variant),
        *("--json", str(tmp_path / "deeper/out.json"), "train.amp.enabled=False"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "deeper/out.json").read_text())
    seconds = {name: x["median"] for name, x in found["seconds"].items()}
    assert list(seconds) == [
        *("student", "teacher_eager", "student_sharedkd", "teacher", "measuring"),
        *("distill", "losses/distill"),
        *("fgd", "losses/fgd", variant, f"losses/{variant}"),
    ]
    overhead = seconds["distill"] / (seconds["student"] + seconds["teacher_eager"])
    assert found["overhead"] == pytest.approx(overhead, rel=1e-3)
    added = (seconds["distill"] - seconds["student_sharedkd"]) / seconds["teacher_eager"]
    assert found["ratios"]["added"]["median"] == pytest.approx(added, rel=1e-2, abs=1e-2)
    assert found["ratios"].keys() >= {"distill/fgd", variant, "losses", "teacher", "over_plain"}
    memory = found["memory_mb"]
    assert memory.keys() == {"student", "student_sharedkd", "distill", "fgd", variant}
    assert memory["distill"] > memory["student_sharedkd"] > 100
    assert found["images"] == [[64, 96]] and found["teacher_precision"] == "float32"
    assert "overhead: " in done.stdout and "| distill" in done.stdout
