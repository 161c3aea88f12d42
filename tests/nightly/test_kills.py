"""A run that is killed again and again loses nothing.  KILLS=50 kills it 50 times."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from same import assert_same

pytestmark = pytest.mark.nightly

KILLS = int(os.environ.get("KILLS", 10))
RUN = (
    "train.max_iter=12",
    "train.checkpointer.period=2",
    "train.checkpointer.max_to_keep=2",
    "train.eval_period=4",
)


def moments(folder, startup, seconds, draw):
    """Name -> whether the moment has come, asked again and again from the start of the process."""
    begin, log = time.monotonic(), folder / "log.txt"
    known, logged = set(folder.glob("*.pth")), log.stat().st_size if log.exists() else 0
    starting, anywhere = draw.uniform(0, startup), draw.uniform(0, seconds)
    return {
        "start": lambda: time.monotonic() - begin > starting,
        "anywhere": lambda: time.monotonic() - begin > anywhere,
        "writing": lambda: [x for x in folder.glob("*.pth*") if x.suffix != ".pth"],
        "before the pointer": lambda: set(folder.glob("*.pth")) - known,
        "evaluation": lambda: log.exists() and b"Start inference" in log.read_bytes()[logged:],
    }


def kill_at(process, due, draw):
    """SIGKILL for a run and its workers at that moment; False if the run ended before."""
    while not due():
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    time.sleep(draw.choice([0, draw.uniform(0, 0.05)]))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def check(folder):
    """Every checkpoint can be read, and the last one is there."""
    for path in folder.glob("*.pth"):
        torch.load(path, weights_only=True)
    last = folder / "last_checkpoint"
    assert not last.exists() or (folder / last.read_text()).exists()


def assert_equal_runs(whole, killed):
    """Student, optimizer, parameters of the losses, random state, and the last evaluation."""
    first, second = (
        torch.load(folder / "model_final.pth", weights_only=True) for folder in (whole, killed)
    )
    assert first["distillation"] and first["trainer"]
    assert_same(first, second)
    first, second = (
        json.loads((folder / "run.json").read_text())["results"] for folder in (whole, killed)
    )
    assert repr(first) == repr(second)  # a nan is not equal to itself


def test_a_killed_run_ends_as_an_uninterrupted_one(start, tmp_path):
    draw, whole = random.Random(0), tmp_path / "whole"
    begin = time.monotonic()
    process = start(whole, *RUN)
    while not (whole / "metrics.json").exists() and process.poll() is None:
        time.sleep(0.05)
    startup = time.monotonic() - begin
    assert process.wait() == 0, start.console.read_text()
    seconds = time.monotonic() - begin

    died, runs = [], 0
    while len(died) < KILLS:
        runs += 1
        folder = tmp_path / f"killed{runs}"
        while True:
            process = start(folder, *RUN, flags=["--resume"])
            if len(died) == KILLS:
                break
            times = moments(folder, startup, seconds, draw)
            name = list(times)[len(died) % len(times)]
            if not kill_at(process, times[name], draw):
                break
            died.append(name)
            check(folder)
        assert process.wait() == 0, start.console.read_text()
        check(folder)
        assert_equal_runs(whole, folder)
        shutil.rmtree(folder)
    print(f"{len(died)} kills, {runs} runs compared, {time.monotonic() - begin:.0f} s")
