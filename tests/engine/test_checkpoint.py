"""Interruptions and full disks, at every moment of a run of a toy model: nothing is lost, nothing twice."""

import errno
import json
import os
import signal
import zipfile
from itertools import count

import pytest
import torch
from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import LinearParamScheduler
from omegaconf import OmegaConf
from same import assert_same
from torch import nn

from sharedkd import ConfigError, SharedKDTrainer
from sharedkd.config import TRAIN_DEFAULTS
from sharedkd.engine import run as engine
from sharedkd.engine.checkpoint import (
    SaveError,
    StudentCheckpointer,
    check_complete,
    disk_failure,
    has_run,
    latest_checkpoint,
)
from sharedkd.engine.hooks.record import RunRecord
from sharedkd.engine.interrupt import Stopped
from sharedkd.engine.resume import (
    check_settings,
    config_kept,
    saved_config,
)
from sharedkd.files import remove_unfinished, replace

LENGTH = 9


class Killed(BaseException):
    """Stands for SIGKILL: nothing runs any more, see Trainer.after_train."""


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(64, 64)

    def forward(self, batch):
        x = torch.stack([x["image"] for x in batch])
        noise = torch.rand(())  # of the step's own random state
        return {"loss_a": self.line(x).square().mean() + noise * self.line.weight.square().sum()}


class Batches:
    first_batch = 0

    def __iter__(self):
        for i in count(self.first_batch):
            yield [{"image": torch.full((64,), float(i % 5))}]


class Trainer(SharedKDTrainer):
    killed = False
    period = 1  # of reading the losses

    def before_train(self):
        self.log.period = self.period
        super().before_train()

    def after_train(self):
        if not self.killed:
            super().after_train()


@pytest.fixture
def toy(monkeypatch):
    """Trains the toy through :func:`sharedkd.engine.run.train`; ``at(where, iteration)`` sees all moments."""

    def train(folder, at=lambda where, iteration: None, **keys):
        torch.manual_seed(0)
        model = Toy()
        trainer = Trainer(
            model, Batches(), torch.optim.AdamW(model.parameters(), 0.1), max_iter=LENGTH, seed=0
        )

        def moment(where):
            try:
                at(where, trainer.iter)
            except Killed:
                trainer.killed = True
                raise

        def before(name, owner, where):
            original = getattr(owner, name)

            def wrapped(*args, **kwargs):
                moment(where)
                return original(*args, **kwargs)

            patch.setattr(owner, name, wrapped)

        def evaluate(cfg, model):
            moment("evaluation")
            model([{"image": torch.ones(64)}])
            return {"box": {"AP": float(model.line.bias.sum()), "APs": float("nan")}}

        def half_saved(data, f):
            save(data, f)
            f.truncate(1000)
            moment("saving")
            f.seek(0)
            f.truncate()
            save(data, f)

        cfg = OmegaConf.create({"train": TRAIN_DEFAULTS, "dataloader": {}})
        cfg.train.update(output_dir=str(folder), max_iter=LENGTH, log_period=2, eval_period=4)
        cfg.train.checkpointer = dict(period=2, max_to_keep=2)
        cfg.train.update(keys)
        cfg.lr_multiplier = L(LinearParamScheduler)(start_value=1.0, end_value=0.1)
        folder.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            save = torch.save
            patch.setattr(torch, "save", half_saved)
            patch.setattr(engine, "evaluate", evaluate)
            # They contain a digest of the package, which may be edited meanwhile.
            patch.setattr("sharedkd.engine.hooks.record.versions", dict)
            before("run_step", Trainer, "step")
            before("tag_last_checkpoint", StudentCheckpointer, "pointing")
            before("after_step", RunRecord, "written")
            before("after_train", RunRecord, "end")
            checkpoint = latest_checkpoint(str(folder)) if has_run(folder) else None
            with disk_failure(str(folder)):
                return engine.train(cfg, trainer, checkpoint)

    return train


def killed_at(moment, toy, folder):
    def at(*now):
        if now == moment:
            raise Killed

    with pytest.raises(Killed):
        toy(folder, at)


def metrics(folder):
    """(the iterations of losses, (iteration, AP) of the evaluations)"""
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    losses = [x["iteration"] for x in rows if "total_loss" in x]
    return losses, {(x["iteration"], x["box/AP"]) for x in rows if "box/AP" in x}


def record(folder):
    found = json.loads((folder / "run.json").read_text())
    return repr({k: v for k, v in found.items() if k != "peak_memory_mb"})


def state(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


@pytest.fixture
def whole(toy, tmp_path):
    """The folder of the uninterrupted run."""
    toy(tmp_path / "whole")
    return tmp_path / "whole"


def assert_equal(folder, whole, lost=1):
    (losses, evaluations), (all_losses, all_evaluations) = metrics(folder), metrics(whole)
    assert losses == sorted({*losses})
    # The line of an iteration may be lost whose checkpoint was saved before it was logged.
    assert len({*all_losses} - {*losses}) <= lost
    assert evaluations == all_evaluations
    assert record(folder) == record(whole)
    assert_same(state(folder), state(whole))


SAVES = (1, 3, 5, 7, 8)  # every second step, and the last
MOMENTS = [
    *(("step", i) for i in range(LENGTH)),
    *(("saving", i) for i in SAVES),
    *(("pointing", i) for i in SAVES),
    *(("evaluation", i) for i in (3, 7, 9)),
    *(("written", i) for i in range(LENGTH)),
    ("end", 9),
]


def test_killed_at_every_moment_and_resumed(toy, whole, tmp_path):
    losses, evaluations = metrics(whole)
    assert losses == [1, 3, 5, 7, 8] and [x for x, _ in sorted(evaluations)] == [3, 7, 9]
    for moment in MOMENTS:
        folder = tmp_path / f"{moment[0]}{moment[1]}"

        killed_at(moment, toy, folder)
        for path in folder.glob("*.pth"):
            check_complete(path)
        if (folder / "last_checkpoint").exists():
            check_complete(folder / (folder / "last_checkpoint").read_text())
        toy(folder)
        assert_equal(folder, whole)


def test_killed_again_and_again(toy, whole, tmp_path):
    """Each life is one moment longer than the one before."""
    folder, lives = tmp_path / "run", 0
    for life in count(1):
        left = iter(range(life + 1))

        def at(where, iteration):
            if next(left, None) is None:
                raise Killed

        try:
            toy(folder, at)
            break
        except Killed:
            lives += 1
    assert lives > 5
    assert_equal(folder, whole, lost=lives)


@pytest.mark.parametrize("where, iteration", [("step", 4), ("evaluation", 3), ("evaluation", 9)])
@pytest.mark.parametrize("number, period", [(signal.SIGTERM, 1), (signal.SIGINT, 20)])
def test_a_signal_saves_and_says_how_to_go_on(
    toy, whole, tmp_path, monkeypatch, sharedkd_log, where, iteration, number, period
):
    """After this step also where losses are read every 20 steps, as on a GPU."""
    monkeypatch.setattr(Trainer, "period", period)
    folder = tmp_path / "run"

    def at(here, now):
        if (here, now) == (where, iteration):
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        toy(folder, at)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    done = min(iteration, LENGTH - 1)
    last = latest_checkpoint(str(folder))
    assert torch.load(last, weights_only=True)["iteration"] == done  # no step was lost
    assert f"Stopped after iteration {done}; {os.path.basename(last)}" in sharedkd_log.text
    assert "--resume" in sharedkd_log.text
    toy(folder)
    assert_equal(folder, whole)


def break_disk(monkeypatch, name, code, *, suffix):
    """Make os.NAME fail for files of a suffix, as a full or read-only disk would."""
    original = getattr(os, name)

    def broken(target, *args):
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
        if str(path).endswith(suffix):
            raise OSError(code, os.strerror(code))
        return original(target, *args)

    monkeypatch.setattr(os, name, broken)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, name, code):
    path = tmp_path / "file"
    replace(str(path), lambda f: f.write(b"old"))
    break_disk(monkeypatch, name, code, suffix=".tmp")
    with pytest.raises(OSError) as error:
        replace(str(path), lambda f: f.write(b"new"))
    assert error.value.errno == code
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    done = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))
    verify = lambda path: done.append(f"verified {os.path.basename(path)}")  # noqa: E731
    replace(str(tmp_path / "file"), lambda f: f.write(b"x"), verify=verify)
    assert done == [f"{tmp_path}/file.tmp", "verified file.tmp", "rename", str(tmp_path)]


def test_what_cannot_be_verified_does_not_get_the_name(tmp_path):
    path = tmp_path / "model_final.pth"
    path.write_bytes(b"old")
    with pytest.raises(zipfile.BadZipFile):
        replace(str(path), lambda f: f.write(b"torn"), verify=check_complete)
    assert path.read_bytes() == b"old" and len(os.listdir(tmp_path)) == 1


def test_unfinished_files_are_removed_and_others_are_not(tmp_path):
    for name in ("model_final.pth.tmp", "last_checkpoint.tmp", "mine.tmp", "model_final.pth"):
        (tmp_path / name).touch()
    remove_unfinished(str(tmp_path), "*.pth")
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint.tmp", "mine.tmp", "model_final.pth"]


def test_every_flipped_or_missing_part_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": Toy().state_dict(), "iteration": 3}, path)
    check_complete(path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as f:
        inside = [(x.header_offset + 200, x.file_size) for x in f.infolist() if x.file_size > 4000]
    assert inside
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises((OSError, zipfile.BadZipFile)):
            check_complete(path)
    for start, size in inside:
        torn = bytearray(whole)
        torn[start + size // 2] ^= 1
        path.write_bytes(torn)
        with pytest.raises((OSError, zipfile.BadZipFile)):
            check_complete(path)


def nth(n, moment, error):
    """Raises ``error`` when a moment comes for the n-th time."""
    left = [moment] * n

    def at(*now):
        if left and now == moment:
            left.pop()
            if not left:
                raise error

    return at


#: The last step then has two checkpoints, a numbered one and the final one.
BOTH = dict(checkpointer=dict(period=3, max_to_keep=2))


@pytest.mark.parametrize("where", ["saving", "pointing"])
def test_killed_between_the_last_two_checkpoints(toy, tmp_path, where):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    toy(whole, **BOTH)
    with pytest.raises(Killed):
        toy(folder, nth(2, (where, LENGTH - 1), Killed), **BOTH)
    assert (folder / "last_checkpoint").read_text() == "model_0000008.pth"
    toy(folder, **BOTH)
    assert_equal(folder, whole)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


def test_a_final_checkpoint_that_is_there_is_not_written_again(toy, tmp_path):
    folder = tmp_path / "run"
    killed_at(("evaluation", LENGTH), toy, folder)
    before = (folder / "model_final.pth").stat()
    toy(folder)
    after = (folder / "model_final.pth").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("damage", ["torn", "gone", "flipped"])
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(
    toy, whole, tmp_path, sharedkd_log, damage
):
    folder = tmp_path / "run"
    killed_at(("step", 7), toy, folder)
    newest = folder / (folder / "last_checkpoint").read_text()
    assert newest.name == "model_0000005.pth"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content if damage == "flipped" else content[:2000])
    if damage == "gone":
        newest.unlink()
    assert latest_checkpoint(str(folder)) == str(folder / "model_0000003.pth")
    assert "model_0000005.pth: " in sharedkd_log.text
    assert "goes on from model_0000003.pth" in sharedkd_log.text
    toy(folder)
    assert_equal(folder, whole)


def test_without_any_whole_checkpoint_nothing_is_overwritten(toy, tmp_path):
    folder = tmp_path / "run"
    toy(folder)
    for path in folder.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="train.output_dir=.*has no complete checkpoint"):
        toy(folder)


def full_disk_later(monkeypatch, first):
    """Checkpoints can be written until iteration ``first``; after that the disk is full."""

    def at(where, iteration):
        if where == "saving" and iteration >= first:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return at


def test_a_full_disk_stops_the_run_with_one_line(toy, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(SaveError) as error:
        toy(folder, full_disk_later(monkeypatch, first=4))
    message = str(error.value)
    assert "\n" not in message
    assert "No space left on device" in message and "model_0000003.pth is intact" in message
    assert "--resume" in message
    assert not list(folder.glob("*.tmp"))
    check_complete(folder / "model_0000003.pth")
    toy(folder)  # there is room again
    assert_equal(folder, whole)


def test_old_checkpoints_go_also_after_a_resumption(toy, tmp_path):
    folder = tmp_path / "run"
    killed_at(("step", 5), toy, folder)
    toy(folder)
    names = sorted(p.name for p in folder.glob("*.pth"))
    assert names == ["model_0000005.pth", "model_0000007.pth", "model_final.pth"]


def settings(folder, **changes):
    cfg = OmegaConf.create(
        {
            "model": {
                "student": {"depth": 18, "classes": "${data.classes}"},
                "teacher": {"config": "a.yaml", "weights": "a.pth"},
                "stages": {"cross": {"weight": 1.0, "strides": [4, 8]}},
            },
            "data": {"classes": 3},
            "optimizer": {"lr": 0.1},
            "train": {**TRAIN_DEFAULTS, "output_dir": str(folder)},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("model.teacher", None, "model.teacher=None: was {'config': 'a.yaml'"),
        ("model.stages.cross.strides", [4, 16], "model.stages.cross.strides.1=16: was 8"),
        ("model.stages.cross.start", 5, "model.stages.cross.start=5: was not set"),
        ("data.classes", 4, "model.student.classes=4: was 3"),  # through the reference to it
        ("train.seed", 1, "train.seed=1: was 0"),
    ],
)
def test_resume_refuses_another_model_teacher_or_stage(tmp_path, sharedkd_log, key, value, named):
    from detectron2.config import LazyConfig

    LazyConfig.save(settings(tmp_path), str(tmp_path / "config.yaml"))
    before = (tmp_path / "config.yaml").read_bytes()
    check_settings(settings(tmp_path))
    with pytest.raises(ConfigError) as error:
        check_settings(settings(tmp_path, **{key: value}))
    assert named in str(error.value) and "train.force_resume=True" in str(error.value)
    assert (tmp_path / "config.yaml").read_bytes() == before
    check_settings(settings(tmp_path, **{key: value, "train.force_resume": True}))
    assert f"resumes with {named.split(':')[0]}" in sharedkd_log.text


class Wordless:
    """What neither yaml nor pickle can hold."""

    def __reduce_ex__(self, protocol):
        raise TypeError("not in words")


def with_object(folder, x):
    cfg = settings(folder)
    cfg._set_flag("allow_objects", True)
    cfg.model.student.norm = x
    return cfg


@pytest.mark.parametrize(
    "then, now, named",
    [
        (
            settings,
            lambda folder: with_object(folder, Wordless()),
            "the config to go on with, .*none",
        ),
        (lambda folder: with_object(folder, lambda x: x), settings, "its config.yaml "),
    ],
    ids=["now", "then unreadable"],
)
def test_resume_refuses_what_it_cannot_compare(tmp_path, sharedkd_log, then, now, named):
    """Detectron2 logs that it cannot write a config, and goes on: it might be any other one."""
    from detectron2.config import LazyConfig

    LazyConfig.save(then(tmp_path), str(tmp_path / "config.yaml"))
    cfg = now(tmp_path)
    with pytest.raises(ConfigError, match=f"^train.output_dir={tmp_path}: {named}") as error:
        check_settings(cfg)
    assert "\n" not in str(error.value) and "train.force_resume=True" in str(error.value)
    cfg.train.force_resume = True
    check_settings(cfg)
    assert "train.force_resume: train.output_dir" in sharedkd_log.text


@pytest.mark.parametrize(
    "key, value",
    [("train.max_iter", 7), ("model.teacher.weights", "moved.pth"), ("train.eval_period", 5)],
)
def test_a_run_may_be_extended_and_files_may_move(tmp_path, key, value):
    from detectron2.config import LazyConfig

    LazyConfig.save(settings(tmp_path), str(tmp_path / "config.yaml"))
    check_settings(settings(tmp_path, **{key: value}))


def test_the_config_of_a_run_is_never_half_written(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("first")
    with pytest.raises(Killed), config_kept(str(tmp_path)):
        path.write_text("sec")
        raise Killed
    for _ in range(2):
        with open(saved_config(str(tmp_path))) as f:
            assert f.read() == "first"
        with pytest.raises(Killed), config_kept(str(tmp_path)):
            path.write_text("third")
            raise Killed
    with config_kept(str(tmp_path)):
        path.write_text("fourth")
    assert saved_config(str(tmp_path)) == str(path)
