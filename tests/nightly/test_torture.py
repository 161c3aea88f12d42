"""Real processes: killed and resumed, stopped by a signal, refused; see docs/reliability.md."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
import tiny
import torch

from sharedkd import ConfigError
from sharedkd.engine.checkpoint import check_complete
from sharedkd.engine.lock import BusyError, locked


def test_a_short_torture(tmp_path):
    """`make torture` in small: one death of each kind, a run of some length, some arms at once."""
    command = [sys.executable, str(tiny.ROOT / "tools/torture.py"), "--output", str(tmp_path)]
    command += ["--kills", "5", "--comparison-kills", "0", "--arms", "4", "--steps", "100"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "torture.json").read_text())
    assert result["kills"]["kills"] == 5 and set(result["kills"]["moments"].values()) == {1}
    assert result["kills"]["checkpoints read after a kill"] > 2
    assert result["long run"]["run: growth"] < 0.1 and result["long run"]["worker: growth"] < 0.1
    assert result["long run"]["bytes logged a step"] < 1000
    assert result["load"]["arms"] == 4 and result["load"]["downloads"] == 1


@pytest.fixture(scope="module")
def torture():
    spec = importlib.util.spec_from_file_location("torture", tiny.ROOT / "tools/torture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _live(seconds):
    os.setpgrp()
    time.sleep(seconds)


def test_only_what_a_kill_ended_is_counted(torture, tmp_path, monkeypatch):
    """The unkilled one, one that ends before its moment, one that is killed, and what continues it."""
    lives, folders = iter([0.5, 0, 30, 0]), []

    def comparison(config, overrides, folder):
        folder.mkdir(exist_ok=True)
        folders.append(folder.name)
        process = torture.FORK.Process(target=_live, args=(next(lives),))
        process.start()
        return process

    monkeypatch.setattr(torture, "comparison", comparison)
    monkeypatch.setattr(torture, "finished_arms", lambda folder: [])
    monkeypatch.setattr(torture.random, "uniform", lambda low, high: high)
    found = torture.killed_comparisons(tmp_path / "pair.py", [], tmp_path, 1)
    assert folders == ["whole", "killed1", "killed2", "killed2"]
    assert found["kills of a comparison"] == 1
    assert found["comparisons compared with the uninterrupted one"] == 2


def test_what_a_cache_may_not_hold_is_found(torture, tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    name = f"teacher-{sha256(b'whole').hexdigest()}.pth"
    url, file, part = f"http://127.0.0.1:1/{name}", tmp_path / name, tmp_path / f"{name}.0.part"
    file.write_bytes(b"whole")
    torture.check_cache(url, 1)
    with pytest.raises(torture.Lost, match="2 times"):
        torture.check_cache(url, 2)
    part.write_bytes(b"wh")
    with pytest.raises(torture.Lost, match="part"):
        torture.check_cache(url, 1)
    part.unlink()
    file.write_bytes(b"wh")
    with pytest.raises(torture.Lost, match="damaged"):
        torture.check_cache(url, 1)


def started(output, *command):
    """A training process of a group of its own, with three steps behind it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for_lines(process, output, 3)
    return process


def wait_for_lines(process, output, more):
    """Until the run has logged so many steps more."""

    def lines():
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    metrics, deadline = output / "metrics.json", time.time() + 300
    due = lines() + more
    while lines() < due:
        if process.poll() is not None or time.time() > deadline:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.05)


def assert_stopped(process, output, status):
    said = process.communicate(timeout=300)[0]
    assert process.returncode == status, said
    assert "Traceback" not in said and "DataLoader worker" not in said
    (line,) = (x for x in said.splitlines() if "Stopped after iteration" in x)
    last = output / (output / "last_checkpoint").read_text()
    check_complete(last)
    saved = torch.load(last, weights_only=True)["iteration"]
    assert f"Stopped after iteration {saved}; {last.name} is intact" in line
    assert "lazyconfig_train_net.py --resume --config-file" in line
    return said


def endless(workspace, output):
    return [
        *workspace.data,
        f"train.output_dir={output}",
        "train.max_iter=100000",
        "train.checkpointer.period=100000",
    ]


def test_ctrl_c_reaches_run_and_workers(workspace, tmp_path):
    """As from a terminal, which signals the whole group; meanwhile, nobody else may train there."""
    output = tmp_path / "run"
    opts = [*endless(workspace, output), "dataloader.train.num_workers=2"]
    process = started(output, *tiny.command("custom_coco_plain.py", *opts))
    from sharedkd.engine.run import run

    before = {p.name for p in output.iterdir()}
    for flags in ([], ["--resume"]):
        with pytest.raises(ConfigError, match=f"process {process.pid} on .* trains in this folder"):
            run(tiny.arguments("custom_coco_plain.py", *opts, flags=flags))
    with pytest.raises(BusyError), locked(output):
        pass
    assert {p.name for p in output.iterdir()} == before
    os.killpg(process.pid, signal.SIGINT)
    assert_stopped(process, output, 130)


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches CPU processes")
def test_several_processes_stop_at_the_same_step(workspace, tmp_path):
    """The signal goes to the process that has started them, as a scheduler's does."""
    output = tmp_path / "run"
    flags = ["--num-gpus", "2", "--dist-url", "auto"]
    opts = endless(workspace, output)
    process = started(output, *tiny.command("custom_coco_plain.py", *opts, flags=flags))
    process.terminate()
    said = assert_stopped(process, output, 143)
    assert said.count("stops after this step") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches CPU processes")
def test_ctrl_c_reaches_several_processes_and_their_workers(workspace, tmp_path):
    output = tmp_path / "run"
    flags = ["--num-gpus", "2", "--dist-url", "auto"]
    opts = [*endless(workspace, output), "dataloader.train.num_workers=1"]
    process = started(output, *tiny.command("custom_coco_plain.py", *opts, flags=flags))
    workers = [worker for rank in children(process.pid) for worker in children(rank)]
    assert len(workers) == 2
    for worker in workers:  # it comes to each in its own time: here far too early
        os.kill(worker, signal.SIGINT)
    wait_for_lines(process, output, 4 + PREFETCHED)
    os.killpg(process.pid, signal.SIGINT)
    said = assert_stopped(process, output, 130)
    assert said.count("stops after this step") == 1


PREFETCHED = 2  # batches that a worker has loaded in advance


def children(pid):
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(x) for thread in threads for x in (thread / "children").read_text().split()]
