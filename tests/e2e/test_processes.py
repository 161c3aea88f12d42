"""Runs in processes of their own: several over gloo by torchrun, stopped by a signal, refused."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import ranks
import tiny
import torch
import torch.multiprocessing as mp
from two import in_two

from sharedkd import ConfigError
from sharedkd.engine.launch import launch
from sharedkd.engine.run import run

TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
TORCHRUN += ["--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
ENDLESS = ("train.max_iter=100000", "train.checkpointer.period=100000")


def torchrun(config, *opts, flags=()):
    """The command of a run in two processes."""
    return [*TORCHRUN, *tiny.command(config, *opts, flags=flags)[3:]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches CPU processes")
def test_two_processes_equal_one(tmp_path):
    """The same global batch; and every method trains where a process has no object."""
    state, losses, size = in_two(ranks.train, tmp_path)[0]
    expected_state, expected_losses = ranks.three_steps()
    assert size == 2
    assert not torch.equal(state["scale"], torch.ones_like(state["scale"]))
    assert state.keys() == expected_state.keys() and losses.keys() == expected_losses.keys()
    for key, value in expected_state.items():
        atol = max(1e-3 * value.abs().max().item(), 1e-5)
        torch.testing.assert_close(state[key], value, rtol=0, atol=atol, msg=key)
    for key, value in expected_losses.items():
        assert losses[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def started(output, command):
    """A run of a process group of its own, with three steps behind it."""
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics, deadline = output / "metrics.json", time.monotonic() + 300
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.05)
    return process


def assert_stopped(said, output):
    """It has saved, and says how to resume; returns the iteration."""
    assert "DataLoader worker" not in said
    (line,) = (x for x in said.splitlines() if "Stopped after iteration" in x)
    last = output / (output / "last_checkpoint").read_text()
    iteration = torch.load(last, weights_only=True)["iteration"]
    assert f"Stopped after iteration {iteration};" in line and last.name in line
    assert "lazyconfig_train_net.py --resume --config-file" in line
    return iteration


def test_ctrl_c_reaches_run_and_workers(workspace, tmp_path):
    """As from a terminal, which signals the whole group; meanwhile, nobody else may train there."""
    output = tmp_path / "run"
    opts = [*workspace.data, f"train.output_dir={output}", "dataloader.train.num_workers=2"]
    process = started(output, tiny.command("custom_coco_plain.py", *opts, *ENDLESS))
    before = {p.name for p in output.iterdir()}
    for flags in ([], ["--resume"]):
        with pytest.raises(ConfigError, match="train.output_dir=.*"):
            run(tiny.arguments("custom_coco_plain.py", *opts, *ENDLESS, flags=flags))
    assert {p.name for p in output.iterdir()} == before
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 130 and "Traceback" not in said, said
    assert_stopped(said, output)


@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="launches CPU processes")
def test_two_processes_stop_resume_and_evaluate(workspace, tmp_path):
    """SIGTERM goes to torchrun, as a scheduler's does; both processes stop at the same step."""
    output = tmp_path / "run"
    opts = [*workspace.data, *workspace.pair, f"train.output_dir={output}"]
    process = started(output, torchrun("custom_coco_mask.py", *opts, *ENDLESS))
    process.terminate()
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    stopped = assert_stopped(said, output)

    more = [f"train.max_iter={stopped + 3}", "train.checkpointer.period=100000"]
    resume = torchrun("custom_coco_mask.py", *opts, *more, flags=["--resume"])
    done = subprocess.run(resume, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == stopped + 2
    record = json.loads((output / "run.json").read_text())
    assert record["processes"] == 2 and record["results"].keys() == {"bbox", "segm"}


def refused(rank, folder, port, opts):
    """A run in the environment that torchrun makes, whose errors go to a file."""
    size, number = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"), str(rank)
    place = dict(MASTER_ADDR="localhost", MASTER_PORT=port)
    os.environ.update(RANK=number, LOCAL_RANK=number, **size, **place)
    os.dup2(os.open(f"{folder}/said{rank}", os.O_CREAT | os.O_WRONLY), 2)
    launch(run, tiny.arguments("custom_coco_mask.py", *opts))


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches CPU processes")
def test_two_processes_refuse_in_one_line(workspace, tmp_path):
    opts = [*workspace.data, *workspace.pair, f"train.output_dir={tmp_path}/run"]
    opts.append("model.teacher.config=none")
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    with pytest.raises(mp.ProcessExitedException) as end:
        mp.start_processes(refused, (str(tmp_path), port, opts), 2, start_method="forkserver")
    assert end.value.exit_code == 1
    said = "".join((tmp_path / f"said{rank}").read_text() for rank in (0, 1))
    (line,) = [x for x in said.splitlines() if x.startswith("error: ")]
    assert line.startswith("error: model.teacher.config=none: ")
    assert not (tmp_path / "run").exists()
