"""Whole runs and evaluations on a disk that is full or read-only: one line, and nothing lost."""

import json
import os
import subprocess
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.evaluation import DatasetEvaluator
from disks import FAULTS, mounted, unmount
from omegaconf import OmegaConf
from tiny import arguments, command

from sharedkd.engine import run as engine
from sharedkd.engine.checkpoint import SaveError, SaveErrors
from sharedkd.engine.evaluators import build_evaluators
from sharedkd.engine.resume import config_kept, latest_checkpoint, saved_config

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG = "custom_coco_plain.py"
SHORT = ("train.max_iter=2", "train.eval_period=1", "train.checkpointer.period=1")


@contextmanager
def disk(folder, size):
    if not mounted(folder, size):
        pytest.skip("may not mount a disk")
    try:
        yield
    finally:
        unmount(folder)


@pytest.fixture(params=FAULTS)
def fault(request, tmp_path, capfd):
    """A disk of 4 MB; ``breaks(folder)`` puts a folder on it at fault until it is left."""
    with disk(tmp_path / "disk", "4m"):
        breaks, reason = FAULTS[request.param]
        yield SimpleNamespace(breaks=breaks, reason=reason, disk=tmp_path / "disk")
    shown = capfd.readouterr().err
    assert "Traceback" not in shown and "Logging error" not in shown


def one_line(error, fault):
    message = str(error.value)
    assert "\n" not in message and fault.reason in message
    assert message.startswith("train.output_dir=")
    return message


@pytest.fixture(scope="session")
def whole(workspace):
    """The folder of a run whose disk has room."""
    folder = workspace.root / "room"
    engine.run(arguments(CONFIG, *workspace.data, *SHORT, f"train.output_dir={folder}"))
    return folder


def evaluations(folder):
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [x["bbox/AP"] for x in lines if "bbox/AP" in x]


# --- an evaluator's files -------------------------------------------------------------------------


def test_a_run_stops_at_an_evaluation_whose_files_are_refused(train, whole, fault, tmp_path):
    results = fault.disk / "results"
    results.mkdir()
    options = (*SHORT, f"dataloader.evaluator.output_dir={results}")
    with fault.breaks(fault.disk):
        with pytest.raises(SaveError) as error:
            train(CONFIG, *options)
        message = one_line(error, fault)
    folder = tmp_path / "run"
    assert str(results) in message and "model_0000000.pth is intact" in message
    assert latest_checkpoint(str(folder)) == str(folder / "model_0000000.pth")

    train(CONFIG, *options, flags=["--resume"])  # there is room again
    assert evaluations(folder) == evaluations(whole)
    assert (results / "coco_instances_results.json").stat().st_size


class Large(DatasetEvaluator):
    """Finds room for a file when it is built, and none for that which it writes."""

    def __init__(self, output_dir):
        self.path = f"{output_dir}/predictions.pth"

    def evaluate(self):
        with open(self.path, "wb") as f:
            torch.save(torch.zeros(2**21), f)
        return {"bbox": {"AP": 1.0}}


def test_a_disk_that_fills_up_while_results_are_written(tmp_path, sharedkd_log):
    nodes = OmegaConf.create([{"_target_": f"{__name__}.Large", "output_dir": str(tmp_path / "d")}])
    with disk(tmp_path / "d", "2m"):
        stopping = SaveErrors(str(tmp_path), "stop")
        (evaluator,) = build_evaluators(nodes, stopping.handled)
        with pytest.raises(SaveError, match="No space left on device"):
            evaluator.evaluate()
        (tmp_path / "d/predictions.pth").unlink()
        going_on = SaveErrors(str(tmp_path), "continue")
        (evaluator,) = build_evaluators(nodes, going_on.handled)
        assert evaluator.evaluate() == {}
        assert "training goes on" in sharedkd_log.text
    (evaluator,) = build_evaluators(nodes, stopping.handled)
    assert evaluator.evaluate() == {"bbox": {"AP": 1.0}}


# --- what a run begins with -----------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch):
    """The disk is found good, and then something happens, before anything is written."""
    room = SimpleNamespace(free=2**40)
    monkeypatch.setattr("shutil.disk_usage", lambda path: room)
    build = engine.build_trainer

    def then(happens):
        def build_trainer(*parts):
            happens()
            return build(*parts)

        monkeypatch.setattr(engine, "build_trainer", build_trainer)

    return then


def test_a_disk_that_fails_before_the_first_step(train, fault, checked):
    with ExitStack() as faults:
        checked(lambda: faults.enter_context(fault.breaks(fault.disk)))
        with pytest.raises(SaveError) as error:
            train(CONFIG, output=fault.disk / "run")
        assert "what a run begins with" in one_line(error, fault)


def test_a_run_to_be_resumed_stays_as_it_is(train, tmp_path, checked, capfd):
    """Also if what a killed run left cannot be removed."""
    folder, _ = train(CONFIG, "train.max_iter=1")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("log.txt", "lock")}
    (folder / "model_0000009.pth.tmp").mkdir()
    breaks, reason = FAULTS["read-only"]
    resume = dict(output=folder, flags=["--resume"])
    with pytest.raises(SaveError, match="model_0000009.pth.tmp"):
        train(CONFIG, "train.max_iter=2", **resume)
    (folder / "model_0000009.pth.tmp").rmdir()
    if os.geteuid() == 0:
        with ExitStack() as faults:
            checked(lambda: faults.enter_context(breaks(folder)))
            with pytest.raises(SaveError, match=reason):
                train(CONFIG, "train.max_iter=2", **resume)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert "Traceback" not in capfd.readouterr().err


def test_a_config_that_finds_no_room_leaves_the_one_before(fault):
    """Of a run that is resumed with room for its lock alone."""
    cfg = OmegaConf.create({"train": {"output_dir": str(fault.disk), "seed": 0}})
    LazyConfig.save(cfg, str(fault.disk / "config.yaml"))
    before = (fault.disk / "config.yaml").read_bytes()
    again = OmegaConf.merge(cfg, {"train": {"seed": 1}})
    with fault.breaks(fault.disk):
        with pytest.raises(OSError, match=fault.reason), config_kept(str(fault.disk)):
            engine._set_up(again, SimpleNamespace(config_file=""))
        with open(saved_config(fault.disk), "rb") as f:
            assert f.read() == before
    with config_kept(str(fault.disk)):
        engine._set_up(again, SimpleNamespace(config_file=""))
    assert saved_config(fault.disk) == str(fault.disk / "config.yaml")
    assert LazyConfig.load(saved_config(fault.disk)).train.seed == 1


def test_an_evaluation_says_so_before_its_first_image(workspace, whole, fault):
    """A process of its own, whose log is closed at its end."""
    options = (
        f"train.output_dir={fault.disk}/run",
        f"train.init_checkpoint={whole}/model_final.pth",
    )
    with fault.breaks(fault.disk):
        done = subprocess.run(
            command(CONFIG, *workspace.data, *options, flags=["--eval-only"]),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1 and "Evaluation results" not in done.stdout
    assert "Traceback" not in done.stderr and "Logging error" not in done.stderr
    (line,) = [x for x in done.stderr.splitlines() if "train.output_dir" in x]
    assert line.startswith("error: ") and fault.reason in line
