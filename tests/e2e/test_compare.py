"""tools/compare_methods.py from end to end: equal starts, kept and missing arms, failures, shards."""

import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import tiny
import torch
from detectron2.config import LazyConfig, instantiate

from sharedkd import ConfigError
from sharedkd.config import load_config
from sharedkd.engine.lock import BusyError
from sharedkd.engine.run import run
from sharedkd.lab.analysis.pair import Pair
from sharedkd.lab.compare import comparison
from sharedkd.lab.compare.comparison import Arm, Comparison
from sharedkd.lab.compare.students import Student, measure, run_students
from sharedkd.lab.metrics import read_curves
from sharedkd.lab.runs import Run
from sharedkd.modeling.teachers import StudentAverage

ROOT = tiny.ROOT
CONFIG = str(ROOT / "configs/custom_coco.py")
#: In float32 a weight of 1e-300 is one of zero.
IDLE = "pkd:1e-300"
METHODS = ["none", IDLE, f"none@{IDLE}"]
IN_A_PROCESS = f"{IDLE}/seed1"


@pytest.fixture(scope="module")
def overrides(workspace):
    """All students start with the same weights: none copies its teacher's."""
    return [*workspace.data, *workspace.pair, "train.clip_grad_norm=5", "train.inherit=[]"]


def compare(output, overrides, methods=METHODS, seeds=(0, 1), config=CONFIG):
    comparison = Comparison(ROOT, config, methods, seeds, output, overrides)
    comparison.prepare()
    return comparison.run()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, overrides):
    """(folder, console, results.json) of a comparison that the command line ran with two jobs.

    One arm alone is trained by a process of its own: starting one takes longer than training.
    """
    output, console, train = tmp_path_factory.mktemp("comparison"), io.StringIO(), Run.train

    def one_elsewhere(self, *options):
        (train if self.folder == output / IN_A_PROCESS else tiny.train_here)(self, *options)

    def job(command, env):
        assert Path(command[1]).name == "compare_methods.py" and env["TERM"] == "dumb"
        assert tiny.run_tool("compare_methods.py", *command[2:]) is None
        return SimpleNamespace(wait=lambda: 0)

    command = ["--config-file", CONFIG, "--methods", ",".join(METHODS), "--seeds", "0,1"]
    command += ["--output", output, "--jobs", "2", *overrides]
    with (
        mock.patch.object(Run, "train", one_elsewhere),
        mock.patch.object(comparison, "subprocess", SimpleNamespace(Popen=job)),
        contextlib.redirect_stdout(console),
    ):
        assert tiny.run_tool("compare_methods.py", *command) is None
    return output, console.getvalue(), json.loads((output / "results.json").read_text())


def arm(record, method, seed):
    return next(a for a in record["arms"] if (a["method"], a["seed"]) == (method, seed))


def test_every_arm_is_recorded(finished):
    output, console, record = finished
    assert [f"[{i}/6]" in console for i in range(1, 7)] == [True] * 6
    # two jobs, half of the arms each
    assert console.count("[1/3] ") == console.count("[3/3] ") == 2
    assert console.count("already finished") >= 4
    assert len(record["arms"]) == 6 and record["methods"] == METHODS
    assert record["teacher"]["bbox"]["AP"] >= 0
    for each in record["arms"]:
        assert each["status"] == "finished" and each["error"] is None
        assert set(each["results"]["bbox"]) >= {"AP", "AP50", "AP75", "APs", "APm", "APl"}
        assert each["seconds_per_step"] > 0 and each["peak_memory_mb"] > 100
        assert each["parameters"]["student"] > 10**6
        assert each["versions"]["torch"] == torch.__version__ and each["hardware"]
    assert list(record["configs"]) == METHODS
    assert "pkd" in record["configs"][IDLE]["model"]["stages"]
    assert record["configs"]["none"]["model"] == record["configs"][IDLE]["model"]["student"]
    assert all(each["parameters"]["losses"] == 0 for each in record["arms"])
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


def test_an_arms_config_draws_the_weights_that_it_started_from(finished):
    output, _, _ = finished
    assert Pair(str(output / IDLE / "seed1/config.yaml")).initial_is_the_runs is True


def test_an_arm_whose_distillation_weighs_nothing_is_the_plain_one(finished):
    """Data, draws, statistics, clipping and schedule of all steps were the same."""
    output, _, record = finished
    for seed in (0, 1):
        plain, distilled = (
            torch.load(output / m / f"seed{seed}/model_final.pth", weights_only=False)["model"]
            for m in ("none", IDLE)
        )
        assert all(torch.equal(distilled[name], x) for name, x in plain.items())
        assert arm(record, IDLE, seed)["results"] == arm(record, "none", seed)["results"]


@pytest.mark.nightly
def test_a_family_with_a_dense_head(overrides, tmp_path):
    config = str(ROOT / "configs/custom_coco_retinanet.py")
    record = compare(tmp_path, overrides, ["none", "pkd"], [0], config)
    assert [a["status"] for a in record["arms"]] == ["finished"] * 2
    assert len({a["initial_weights"] for a in record["arms"]}) == 1
    assert all(a["results"]["bbox"]["AP"] >= 0 for a in record["arms"])
    assert "Box AP" in (tmp_path / "report.md").read_text()


def test_a_method_may_need_the_teacher_that_the_config_does_not(overrides, tmp_path):
    idle = [*overrides, "model.stages.identical.weight=0"]
    comparison = Comparison(ROOT, CONFIG, ["none", "config", "pkd"], [0], tmp_path, idle)
    comparison.prepare()
    assert LazyConfig.load(str(tmp_path / "configs/pkd.yaml")).model.teacher is not None


def test_a_method_may_be_a_config_of_its_own(workspace, overrides, tmp_path):
    two = f"{ROOT}/configs/schemes/two_teachers.py"
    for key, value in (text.split("=", 1) for text in workspace.pair if "model.teacher." in text):
        two += f":{key.replace('model.teacher.', 'model.teachers.near.')}={value}"
    methods = ["none", "config", two]
    comparison = Comparison(ROOT, CONFIG, methods, [0], tmp_path, overrides)
    comparison.prepare()
    saved = [LazyConfig.load(str(path)) for path in sorted((tmp_path / "configs").glob("*.yaml"))]
    assert [[*cfg.model.get("teachers", {})] for cfg in saved] == [[], [], ["near"]]
    assert {"identical", "near"} < {*saved[2].model.stages}
    assert all(cfg.train.clip_grad_norm == 5 for cfg in saved)  # the overrides are for all


def test_schemes_are_compared_in_one_command(workspace, overrides, tmp_path):
    average, peers = (f"{ROOT}/configs/schemes/{name}.py" for name in ("average", "peers"))
    Comparison(ROOT, CONFIG, ["none", "pkd", average, peers], [0], tmp_path, overrides).prepare()
    saved = {
        path.stem: LazyConfig.load(str(path)).model for path in tmp_path.glob("configs/*.yaml")
    }
    assert {*saved["average"].teacher} == {"_target_", "decay"} and "config" in saved["pkd"].teacher
    assert [*saved["peers"].peers] == ["large"] and saved["peers"].teacher is None


def test_the_flag_teacher_does_not_replace_that_of_a_scheme(workspace, overrides, tmp_path):
    average = f"{ROOT}/configs/schemes/average.py"
    flags = [x for x in overrides if not x.startswith("model.teacher.")] + workspace.flags
    saved = Comparison(ROOT, CONFIG, ["none", average], [0], tmp_path, flags).configs[average]
    assert saved.model.teacher._target_ is StudentAverage
    with pytest.raises(ConfigError, match="^--teacher=.*own, a StudentAverage; leave it out"):
        load_config(average, flags)


def test_keys_of_the_flags_teacher_reach_a_config_that_is_a_method(workspace, tmp_path):
    plain = f"{ROOT}/configs/custom_coco_plain.py"
    keys = [*workspace.data, *workspace.flags]
    keys += ["model.teacher.precision=bfloat16", "distill.method=pkd"]
    Comparison(ROOT, plain, ["none", "config", plain], [0], tmp_path, keys).prepare()
    saved = [LazyConfig.load(str(x)).model for x in sorted(tmp_path.glob("configs/*.yaml"))]
    assert [x.teacher.precision for x in saved if "teacher" in x] == ["bfloat16"] * 2


def test_without_methods_what_the_config_trains_is_compared(workspace, tmp_path):
    keys = [*workspace.data, *workspace.flags]
    for config, more, method in (
        ("custom_coco_plain", [], "shared_kd"),
        ("custom_coco_plain", ["distill.method=inherit"], "inherit"),
        ("custom_coco", [], "shared_kd"),
        ("custom_coco", ["model.stages.identical.share=0.3"], "config"),
    ):
        path = f"{ROOT}/configs/{config}.py"
        found = Comparison(ROOT, path, [], [0], tmp_path, [*keys, *more])
        assert found.methods == ["none", method]
    saved = str(tmp_path / "saved.yaml")  # has classes as texts
    LazyConfig.save(found.cfg, saved)
    assert Comparison(ROOT, saved, [], [0], tmp_path, keys).methods == ["none", "config"]
    keys.append("model.stages.identical.share=1.0")
    assert Comparison(ROOT, saved, [], [0], tmp_path, keys).methods == ["none", "shared_kd"]


def test_a_comparison_of_a_schemes_own_config(overrides, tmp_path):
    config = f"{ROOT}/configs/schemes/peers.py"
    own = [x for x in overrides if not x.startswith("model.teacher.")]
    Comparison(ROOT, config, ["none", "config"], [0], tmp_path, own).prepare()
    assert [*LazyConfig.load(str(tmp_path / "configs/config.yaml")).model.peers] == ["large"]


def test_arms_differ_by_the_distillation_alone(finished):
    output, _, _ = finished
    plain, distilled = (
        LazyConfig.load(str(output / "configs" / f"{m}.yaml")) for m in ("none", IDLE)
    )
    distilled.model = distilled.model.student
    assert plain == distilled
    assert plain.train.clip_grad_norm == 5


def test_equal_time(finished):
    _, _, record = finished
    seconds = {
        m: sum(arm(record, m, s)["seconds_per_step"] for s in (0, 1)) / 2 for m in ("none", IDLE)
    }
    expected = round(4 * seconds[IDLE] / seconds["none"])
    assert {arm(record, f"none@{IDLE}", s)["iterations"] for s in (0, 1)} == {expected}
    assert arm(record, "none", 0)["iterations"] == 4


def test_a_failed_run_does_not_hold_up_those_that_take_its_methods_time(overrides, tmp_path):
    longer = "pkd:train.max_iter=6"  # half as long again
    methods = ["none", longer, f"none@{longer}"]
    comparison = Comparison(ROOT, CONFIG, methods, [0, 1], tmp_path, overrides)
    assert comparison.iterations(f"none@{longer}") is None and comparison.iterations(longer) == 6
    for each in comparison.arms[:4]:
        each.run.folder.mkdir(parents=True)
        seconds = 0.2 if each.method == longer else 0.1
        if (each.method, each.seed) == (longer, 1):
            each.failure.write_text("not finite")
        else:
            (each.run.folder / "run.json").write_text('{"results": {}}')
            (each.run.folder / "metrics.json").write_text(f'{{"iteration": 3, "time": {seconds}}}')
    assert comparison.iterations(f"none@{longer}") == 12


def weights(output):
    return {p: p.stat().st_mtime_ns for p in sorted(output.rglob("model_final.pth"))}


def test_what_is_finished_is_kept_and_more_is_added(finished, overrides, capsys):
    output, _, record = finished
    before = weights(output)
    again = compare(output, overrides, METHODS[:2])  # fewer methods: the others are left alone
    assert capsys.readouterr().out.count("already finished") == 4
    assert weights(output) == before
    for method in METHODS[:2]:
        now, then = (arm(x, method, 1)["results"]["bbox"] for x in (again, record))
        assert now["AP"] == then["AP"] and now.keys() == then.keys()


def test_the_command_of_an_arm_can_be_run_by_itself(finished, overrides, tmp_path):
    output, _, record = finished
    settings = [f"train.output_dir={tmp_path}/run", "train.seed=1"]
    run(tiny.arguments(output / f"configs/{IDLE}.yaml", *settings))
    alone, compared = (
        torch.load(folder / "model_final.pth", weights_only=False)["model"]
        for folder in (tmp_path / "run", output / IN_A_PROCESS)
    )
    assert all(torch.equal(alone[k], compared[k]) for k in compared)


def test_other_settings_are_refused(finished, overrides):
    with pytest.raises(ConfigError, match="other settings"):
        compare(finished[0], [*overrides, "train.clip_grad_norm=9"], ["none"])


@pytest.mark.nightly
def test_a_failed_arm_is_shown_and_the_others_are_trained(overrides, tmp_path, capsys):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from sharedkd import IdenticalLayer, Stage\n"
        "from sharedkd.modeling.stages import stage_dict\n"
        "paper = 'none'\n"
        "stages = dict(faster_rcnn=L(stage_dict)("
        "bad=L(Stage)(loss=L(IdenticalLayer)(), weight=1e38, ramp=2)))\n"
    )
    output = tmp_path / "out"
    record = compare(output, overrides, [str(bad), "none", f"none@{bad}"], seeds=[0])
    broken, plain, timed = record["arms"]
    assert (broken["status"], plain["status"]) == ("failed", "finished")
    assert timed["status"] == "failed" and "no time to take" in timed["error"]
    assert (
        "training stops before the weights change" in broken["error"]
        and "bad" in (output / "report.md").read_text()
    )
    assert "training stops before the weights change" in (output / "report.md").read_text()
    capsys.readouterr()
    again = compare(output, overrides, [str(bad), "none"], seeds=[0])  # is tried again
    assert again["arms"][0]["status"] == "failed"
    assert capsys.readouterr().out.count("already finished") == 1


def tool(output, overrides, methods, *flags, config=CONFIG):
    return [
        sys.executable,
        str(ROOT / "tools/compare_methods.py"),
        *("--config-file", str(config), "--methods", ",".join(methods), "--seeds", "0"),
        *("--output", str(output), *flags),
        *overrides,
    ]


@pytest.mark.nightly
def test_jobs_are_processes(overrides, tmp_path):
    command = tool(tmp_path, overrides, ["none", "pkd"], "--jobs", "2")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[1/1] ") == done.stdout.count("already finished") == 2


@pytest.mark.nightly
def test_shards_share_the_work(overrides, tmp_path):
    methods = ["none", "frs", "none@frs"]
    shards = [
        subprocess.Popen(
            tool(tmp_path, overrides, methods, "--shard", f"{i}/2"),
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in (0, 1)
    ]
    said = [shard.communicate()[0] for shard in shards]
    assert [shard.returncode for shard in shards] == [0, 0]
    assert "[1/2] none" in said[0] and "[1/1] frs" in said[1]
    assert not list(tmp_path.rglob("*.tmp"))
    json.loads((tmp_path / "results.json").read_text())
    last = compare(tmp_path, overrides, methods, seeds=[0])
    assert [a["status"] for a in last["arms"]] == ["finished"] * 3
    width = 128  # of the small FPN; FRS has a 3x3 convolution on each of five levels
    assert [a["parameters"]["losses"] for a in last["arms"]] == [0, 5 * (9 * width + 1) * width, 0]
    assert last["configs"]["frs"]["model"]["stages"]["frs"]["loss"]["adapter"] == 3
    assert "None" not in last["command"] and "--shard" not in last["command"]


def test_methods_have_their_seeds_in_several_shards(overrides, tmp_path, monkeypatch):
    comparison = Comparison(ROOT, CONFIG, ["none", "pkd"], [0, 1, 2], tmp_path, overrides)
    monkeypatch.setattr(comparison, "prepare", lambda: None)
    monkeypatch.setattr(comparison, "report", lambda: None)
    trained = {0: set(), 1: set()}
    for i, found in trained.items():
        monkeypatch.setattr(
            "sharedkd.lab.runs.Run.train",
            lambda run, root, iterations, say, found=found: found.add(
                (run.folder.parent.name, run.folder.name)
            ),
        )
        comparison.train((i, 2))
    assert trained[0] == {("none", "seed0"), ("pkd", "seed1"), ("none", "seed2")}
    assert trained[1] == {("pkd", "seed0"), ("none", "seed1"), ("pkd", "seed2")}


def test_an_arm_is_trained_by_one_process_at_a_time(overrides, tmp_path):
    comparison = Comparison(ROOT, CONFIG, ["none"], [0], tmp_path, overrides)
    run = comparison.arms[0].run
    run.folder.mkdir(parents=True)
    begun, begin = os.pipe()
    for name in ("lock", "comparison.lock"):  # that of its run, that of another comparison
        worker = os.fork()
        if not worker:
            lock = open(run.folder / name, "w")
            fcntl.lockf(lock, fcntl.LOCK_EX)
            os.write(begin, b"1")
            time.sleep(60)
            os._exit(0)
        os.read(begun, 1)
        with pytest.raises(BusyError, match="another process"):
            run.train(ROOT, 4, print)
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
    assert not run.log.exists() or not run.log.read_text()


@pytest.mark.nightly
def test_an_interrupted_comparison_continues(overrides, tmp_path):
    """Of Mask R-CNNs; one only starts from the teacher, as the other does."""
    longer = [*overrides, "train.max_iter=8", "train.checkpointer.period=2", "train.inherit=[neck]"]
    config = ROOT / "configs/custom_coco_mask.py"
    command = tool(tmp_path / "out", longer, ["none", "inherit", "fitnets"], config=config)
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
    assert done.stdout.count("already finished") == 2
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert [a["status"] for a in record["arms"]] == ["finished"] * 3
    plain, *starts = (a["initial_weights"] for a in record["arms"])
    assert len({*starts}) == 1 and plain not in starts
    assert [a["inherited"] > 0 for a in record["arms"]] == [False, True, True]
    assert all(a["results"]["segm"]["AP"] >= 0 for a in record["arms"])
    report = (tmp_path / "out/report.md").read_text()
    assert "Mask AP" in report and "initial weights" not in report
    assert "`fitnets` has " in report


@pytest.mark.parametrize(
    "methods, words",
    [
        (["none", "nonsense"], "no such method"),
        (["none", "none@fgd"], "needs fgd"),
        (["none", "pkd", "none@pkd@none"], "needs pkd@none, which"),
        (["pkd"], "no baseline"),
        (["none", "pkd", "elsewhere/pkd.py"], "has the name of pkd"),
    ],
)
def test_methods_that_cannot_be_compared_are_refused_before_training(
    methods, words, overrides, tmp_path
):
    with pytest.raises(ConfigError, match=words):
        Comparison(ROOT, CONFIG, methods, [0], tmp_path / "out", overrides)
    assert not (tmp_path / "out").exists()


def test_a_start_that_gives_nothing_is_refused_before_training(workspace, tmp_path):
    """The student is trained already, and keeps its FPN and heads; a loss may teach it."""
    trained = tmp_path / "trained.pth"
    torch.save({"model": tiny.detector("faster_rcnn").state_dict()}, trained)
    keys = [*workspace.flags, *workspace.data, f"train.init_checkpoint={trained}"]
    plain = str(ROOT / "configs/custom_coco_plain.py")
    with pytest.raises(ConfigError, match="whose neck and head train.init_checkpoint has"):
        Comparison(ROOT, plain, ["none", "inherit"], [0], tmp_path / "out", keys).prepare()
    Comparison(ROOT, plain, ["none", "pkd"], [0], tmp_path / "out", keys).prepare()


def test_negative_seeds_are_refused(overrides, tmp_path):
    with pytest.raises(ConfigError, match="negative"):
        Comparison(ROOT, CONFIG, ["none"], [-1], tmp_path, overrides)


def test_a_recipe_elsewhere_has_a_folder_of_its_own(overrides, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text((ROOT / "configs/common/methods/pkd.py").read_text())
    methods = ["none", "pkd", str(mine), f"{mine}:2", f"none@{mine}"]
    comparison = Comparison(ROOT, CONFIG, methods, [0], tmp_path, overrides)
    assert [arm.run.folder.parent.name for arm in comparison.arms] == [
        "none",
        "pkd",
        "mine",
        "mine:2",
        "none@mine",
    ]


def test_a_detector_that_finds_nothing_has_an_ap_of_zero(finished, overrides, tmp_path):
    output, _, _ = finished
    weights = shutil.ignore_patterns("*.pth")  # a report needs none
    copy = Path(shutil.copytree(output, tmp_path / "copy", ignore=weights))
    path = copy / "none/seed0/run.json"
    run = json.loads(path.read_text())
    run["results"]["bbox"] = dict.fromkeys(run["results"]["bbox"], float("nan"))
    path.write_text(json.dumps(run))
    record = Comparison(ROOT, CONFIG, METHODS, (0, 1), copy, overrides).report()
    broken, other = arm(record, "none", 0), arm(record, "none", 1)
    assert broken["collapsed"] == ["bbox"] and other["collapsed"] == []
    for name, value in other["results"]["bbox"].items():  # no objects of a size: nobody has a value
        zero, none = broken["results"]["bbox"][name] == 0.0, value != value
        assert zero != (none and name not in ("AP", "AP50", "AP75")), name
    assert "finds nothing" in (copy / "report.md").read_text()


PLAIN = str(ROOT / "configs/custom_coco_plain.py")
DENSE = str(ROOT / "configs/custom_coco_retinanet_plain.py")


@pytest.fixture
def shared(workspace):
    """What all students of a comparison have: data and teacher."""
    config, weights = (text.partition("=")[2] for text in workspace.pair)
    teacher = [f"distill.teacher={config}", f"distill.weights={weights}"]
    return [*workspace.data, *teacher, "train.max_iter=2"]


def test_an_arm_of_students_is_a_student_with_a_method_and_a_seed(shared, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(Comparison, "prepare", lambda self: None)
    monkeypatch.setattr(Run, "train", lambda run, *_: trained.append(run))
    monkeypatch.setattr("sharedkd.lab.compare.comparison.write", lambda *_: None)  # plots
    students = [Student.of(DENSE), Student.of("train.clip_grad_norm=7", PLAIN)]
    records = run_students(ROOT, students, ["none", "pkd"], [0, 3], tmp_path, shared)
    folders = [str(run.folder.relative_to(tmp_path)) for run in trained]
    names = ["custom_coco_retinanet_plain", "custom_coco_plain:clip_grad_norm-7"]
    arms = [f"{method}/seed{seed}" for seed in (0, 3) for method in ("none", "pkd")]
    assert folders == [f"{name}/{arm}" for name in names for arm in arms]
    assert f"train.output_dir={tmp_path}/{folders[0]}" in trained[0].overrides
    assert list(records) == names
    record = records[names[1]]
    assert record["config_file"] == PLAIN and record["baseline"] == "none"
    assert record["overrides"] == [*shared, "train.clip_grad_norm=7"]


def test_a_finished_student_is_exported_and_timed_once(finished, overrides, monkeypatch):
    arm = Comparison(ROOT, CONFIG, METHODS, (0, 1), finished[0], overrides).arms[1]
    assert measure(arm, timed=False) is None
    found = measure(arm)
    path = arm.run.folder / "deployed/student.torchscript.pt"
    assert (found["method"], found["seed"], found["format"]) == (IDLE, 0, "torchscript")
    assert found["megabytes"] == path.stat().st_size / 2**20
    assert 0 < found["milliseconds"]["low"] <= found["milliseconds"]["median"]
    assert "thread(s)" in found["hardware"] and len(found["image"]) == 2
    path.unlink()
    assert measure(arm) == found == measure(arm, timed=False) and not path.exists()


def test_a_student_that_detects_nothing_has_the_latency_of_the_eager_model(workspace, tmp_path):
    run = Run(Path(DENSE), workspace.data, tmp_path)
    model = instantiate(run.cfg.model)
    torch.save({"model": model.state_dict()}, run.weights)
    found = measure(Arm("none", 0, run))
    assert found["format"] == "eager" and "detects nothing" in found["why"]
    assert found["milliseconds"]["median"] > 0 and found["file"] is None
    count = sum(x.numel() for x in model.state_dict().values())
    assert found["megabytes"] == pytest.approx(4 * count / 2**20, rel=1e-3)


@pytest.mark.nightly
def test_students_from_end_to_end(shared, tmp_path):
    students, flags = f"{PLAIN},{DENSE}", ["--methods", "none,pkd", "--seeds", "0"]
    teacher, checkpoint = (text.partition("=")[2] for text in shared if text.startswith("distill."))
    command = [
        sys.executable,
        str(ROOT / "tools/compare_methods.py"),
        "--students",
        students,
        *flags,
    ]
    command += ["--teacher", teacher, "--teacher-weights", checkpoint, "--output", str(tmp_path)]
    command += [text for text in shared if not text.startswith("distill.")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "students.json").read_text())["students"]
    assert list(records) == ["custom_coco_plain", "custom_coco_retinanet_plain"]
    for name, record in records.items():
        assert [arm["status"] for arm in record["arms"]] == ["finished"] * 2
        plain, distilled = record["arms"]  # which starts from the teacher where shapes agree
        same = plain["initial_weights"] == distilled["initial_weights"]
        assert plain["inherited"] == 0 and same == (distilled["inherited"] == 0)
        assert f"| {name}" in done.stdout and "within" not in done.stdout
        assert (tmp_path / name / "report.html").is_file()
    forms = [record["deployed"]["format"] for record in records.values()]
    assert forms == ["torchscript", "eager"]
    before = weights(tmp_path)
    again = subprocess.run([*command, "--latency-ms", "1e6"], capture_output=True, text=True)
    assert again.stdout.count("already finished") == 4 and weights(tmp_path) == before
    assert "Within 1e+06 ms `custom_coco_plain`" in again.stdout
    later = json.loads((tmp_path / "students.json").read_text())["students"]
    assert [r["deployed"] for r in later.values()] == [r["deployed"] for r in records.values()]
