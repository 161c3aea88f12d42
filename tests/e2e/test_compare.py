"""tools/compare_methods.py from end to end: equal starts, kept and missing arms, failures, shards."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from detectron2.config import LazyConfig

from sharedkd import ConfigError
from sharedkd.analysis.pictures import read_curves
from sharedkd.compare import Comparison, run_comparison

ROOT = tiny.ROOT
CONFIG = str(ROOT / "configs/custom_coco.py")
METHODS = ["none", "shared_kd", "frs", "none@frs"]


@pytest.fixture(scope="module")
def overrides(workspace):
    return [*workspace.data, *workspace.pair, "train.clip_grad_norm=5"]


def compare(output, overrides, methods=METHODS, seeds=(0, 1), **options):
    return run_comparison(ROOT, CONFIG, methods, seeds, output, overrides, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, overrides):
    """(folder, console, results.json) of a comparison that the command line ran."""
    output = tmp_path_factory.mktemp("comparison")
    command = [
        sys.executable,
        str(ROOT / "tools/compare_methods.py"),
        *("--config-file", CONFIG, "--methods", ",".join(METHODS), "--seeds", "0,1"),
        *("--output", str(output)),
        *overrides,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout, json.loads((output / "results.json").read_text())


def arm(record, method, seed):
    return next(a for a in record["arms"] if (a["method"], a["seed"]) == (method, seed))


def test_every_arm_is_recorded(finished):
    output, console, record = finished
    assert [f"[{i}/8]" in console for i in range(1, 9)] == [True] * 8
    assert len(record["arms"]) == 8 and record["methods"] == METHODS
    assert record["teacher"]["bbox"]["AP"] >= 0
    for each in record["arms"]:
        assert each["status"] == "finished" and each["error"] is None
        assert set(each["results"]["bbox"]) >= {"AP", "AP50", "AP75", "APs", "APm", "APl"}
        assert each["seconds_per_step"] > 0 and each["peak_memory_mb"] > 100
        assert each["parameters"]["student"] > 10**6
        assert each["versions"]["torch"] == torch.__version__ and each["hardware"]
    losses = {a["method"]: a["parameters"]["losses"] for a in record["arms"]}
    width = 128  # of the small FPN; FRS has a 3x3 convolution on each of five levels
    assert losses == {
        "none": 0,
        "shared_kd": 0,
        "none@frs": 0,
        "frs": 5 * (9 * width * width + width),
    }
    for name in ("ap.png", "cost.png", "sizes.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    report = (output / "report.md").read_text()
    assert all(f"| {method}" in report for method in METHODS)


def test_arms_of_a_seed_start_equal_and_see_the_same_data(finished):
    output, _, record = finished
    for seed in (0, 1):
        starts = {arm(record, m, seed)["initial_weights"] for m in METHODS}
        assert len(starts) == 1
        # The same weights on the same images with the same draws: the same detector losses.
        first = []
        for method in METHODS:
            curves = read_curves(str(output / method / f"seed{seed}" / "metrics.json"))
            names = [k for k in curves if k.startswith("loss_") and "distill" not in k]
            assert len(names) == 4
            first.append({k: curves[k][0] for k in names})
        assert all(losses == pytest.approx(first[0], rel=1e-5) for losses in first)
    assert arm(record, "none", 0)["initial_weights"] != arm(record, "none", 1)["initial_weights"]


def test_arms_differ_by_the_distillation_alone(finished):
    output, _, _ = finished
    plain, distilled = (
        LazyConfig.load(str(output / "configs" / f"{m}.yaml")) for m in ("none", "frs")
    )
    assert plain.model == distilled.model.student
    del plain.model, distilled.model
    assert plain == distilled
    assert plain.train.clip_grad_norm == 5


def test_equal_time(finished):
    _, _, record = finished
    seconds = {
        m: sum(arm(record, m, s)["seconds_per_step"] for s in (0, 1)) / 2 for m in ("none", "frs")
    }
    expected = round(4 * seconds["frs"] / seconds["none"])
    assert {arm(record, "none@frs", s)["iterations"] for s in (0, 1)} == {expected}
    assert arm(record, "none", 0)["iterations"] == 4


def weights(output):
    return {p: p.stat().st_mtime_ns for p in sorted(output.rglob("model_final.pth"))}


def test_what_is_finished_is_kept_and_more_is_added(finished, overrides, capsys):
    output, _, record = finished
    before = weights(output)
    again = compare(output, overrides, METHODS[:3])
    assert capsys.readouterr().out.count("finished before, kept") == 6
    assert weights(output) == before
    for method in METHODS[:3]:
        now, then = (arm(x, method, 1)["results"]["bbox"] for x in (again, record))
        assert now["AP"] == then["AP"] and now.keys() == then.keys()


def test_the_command_of_an_arm_can_be_run_by_itself(finished, overrides, tmp_path):
    output, _, record = finished
    tool = str(ROOT / "tools/lazyconfig_train_net.py")
    config = str(output / "configs/shared_kd.yaml")
    settings = [f"train.output_dir={tmp_path}/run", "train.seed=1"]
    command = [sys.executable, "-W", "ignore", tool, "--config-file", config, *settings]
    subprocess.run(command, check=True, capture_output=True)
    alone, compared = (
        torch.load(folder / "model_final.pth", weights_only=False)["model"]
        for folder in (tmp_path / "run", output / "shared_kd/seed1")
    )
    assert all(torch.equal(alone[k], compared[k]) for k in compared)


def test_other_settings_are_refused(finished, overrides):
    with pytest.raises(ConfigError, match="other settings"):
        compare(finished[0], [*overrides, "train.clip_grad_norm=9"], ["none"])


def test_a_failed_arm_is_shown_and_the_others_are_trained(overrides, tmp_path, capsys):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from sharedkd import IdenticalLayer, Stage\n"
        "from sharedkd.stages import stage_dict\n"
        "paper = 'none'\n"
        "stages = dict(faster_rcnn=L(stage_dict)("
        "bad=L(Stage)(loss=L(IdenticalLayer)(), weight=1e38, ramp=2)))\n"
    )
    output = tmp_path / "out"
    record = compare(output, overrides, [str(bad), "none"], seeds=[0])
    broken, plain = record["arms"]
    assert (broken["status"], plain["status"]) == ("failed", "finished")
    assert "not finite" in broken["error"] and "bad" in (output / "report.md").read_text()
    assert "not finite" in (output / "report.md").read_text()
    capsys.readouterr()
    again = compare(output, overrides, [str(bad), "none"], seeds=[0])  # is tried again
    assert again["arms"][0]["status"] == "failed"
    assert capsys.readouterr().out.count("kept") == 1


def test_shards_share_the_work(overrides, tmp_path, capsys):
    methods = ["none", "fitnets", "none@fitnets"]
    first = compare(tmp_path, overrides, methods, seeds=[0], shard=(0, 2))
    assert [a["status"] for a in first["arms"]] == ["finished", "missing", "missing"]
    assert "waits for other arms" in capsys.readouterr().out
    second = compare(tmp_path, overrides, methods, seeds=[0], shard=(1, 2))
    assert [a["status"] for a in second["arms"]] == ["finished", "finished", "missing"]
    last = compare(tmp_path, overrides, methods, seeds=[0])
    assert [a["status"] for a in last["arms"]] == ["finished"] * 3


def test_an_interrupted_comparison_continues(overrides, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "tools/compare_methods.py"),
        *("--config-file", CONFIG, "--methods", "none,fitnets", "--seeds", "0"),
        *("--output", str(tmp_path / "out")),
        *overrides,
        "train.max_iter=12",
        "train.checkpointer.period=2",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    begun = tmp_path / "out/fitnets/seed0/last_checkpoint"
    deadline = time.time() + 120
    while not begun.exists() and time.time() < deadline:
        time.sleep(0.05)
    assert begun.exists()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kept") == 1
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert [a["status"] for a in record["arms"]] == ["finished"] * 2
    assert len({a["initial_weights"] for a in record["arms"]}) == 1


@pytest.mark.parametrize(
    "methods, words",
    [
        (["none", "gan_kd"], "defined for retinanet"),
        (["none", "nonsense"], "no such method"),
        (["none", "none@fgd"], "needs fgd"),
    ],
)
def test_methods_that_cannot_be_compared_are_refused_before_training(
    methods, words, overrides, tmp_path
):
    with pytest.raises(ConfigError, match=words):
        Comparison(ROOT, CONFIG, methods, [0], tmp_path / "out", overrides)
    assert not (tmp_path / "out").exists()


def test_a_detector_that_finds_nothing_has_an_ap_of_zero(finished):
    output, _, _ = finished
    copy = Path(shutil.copytree(output, output.parent / "collapsed"))
    path = copy / "none/seed0/run.json"
    run = json.loads(path.read_text())
    run["results"]["bbox"] = dict.fromkeys(run["results"]["bbox"], float("nan"))
    path.write_text(json.dumps(run))
    comparison = Comparison.__new__(Comparison)
    comparison.output, comparison.methods, comparison.seeds = copy, ["none"], [0]
    results = comparison.arms[0].record()["results"]["bbox"]
    assert results["AP"] == results["AP50"] == 0.0 and results["APs"] != results["APs"]
