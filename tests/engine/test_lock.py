"""One run in a folder: the lock, whom it names and with whom it ends; and signals."""

import contextlib
import os
import signal
import socket
import sys
import time

import pytest

from sharedkd.engine import interrupt
from sharedkd.engine.interrupt import StopRequest, interruptible, resume_command
from sharedkd.engine.lock import BusyError, check_free, locked
from sharedkd.lab.runs import Run


@pytest.fixture
def holder(tmp_path):
    """Numbers of a process that holds the folder, and of a worker that it has forked meanwhile."""
    said, say = os.pipe()
    process = os.fork()
    if not process:
        with locked(tmp_path):
            worker = os.fork()
            if worker:
                os.write(say, b"%d" % worker)
            time.sleep(120)
        os._exit(0)
    worker = int(os.read(said, 99))
    yield process, worker
    for number in (process, worker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process, 0)
    os.close(said)
    os.close(say)


def test_the_second_is_refused_and_told_who_is_first(tmp_path, holder):
    process, _ = holder
    for attempt in (check_free, lambda folder: locked(folder).__enter__()):
        for _ in range(2):  # the first attempt has freed nothing
            with pytest.raises(BusyError) as error:
                attempt(tmp_path)
            assert str(error.value) == (
                f"train.output_dir={tmp_path}: process {process} on {socket.gethostname()} trains "
                "in this folder; wait for it, or choose another folder"
            )


def test_a_lock_ends_with_its_holder_and_not_with_its_workers(tmp_path, holder):
    """A killed run leaves no stale lock, though its forked worker outlives it by seconds."""
    process, worker = holder
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with locked(tmp_path):
        os.kill(worker, 0)  # it is still there
    check_free(tmp_path)


def test_a_worker_that_ends_frees_nothing(tmp_path, holder):
    os.kill(holder[1], signal.SIGKILL)
    with pytest.raises(BusyError):
        check_free(tmp_path)


def test_a_check_writes_nothing(tmp_path):
    assert check_free(tmp_path / "new") is None and not (tmp_path / "new").exists()


SAVES_AFTER_A_WHILE = """
import signal, sys, time
def save(*signal):
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("eta: 1:00  iter: 3  total_loss: 1.5", flush=True)
time.sleep(60)
"""


class Arm(Run):
    def command(self, root):
        return [sys.executable, "-S", "-c", SAVES_AFTER_A_WHILE]


def test_an_interrupted_comparison_waits_for_its_run_to_save(tmp_path, capsys):
    def say(progress):
        assert str(progress).startswith("iteration 4/9")
        signal.raise_signal(signal.SIGTERM)

    arm = Arm(tmp_path / "config.yaml", [], tmp_path / "arm")
    with pytest.raises(SystemExit) as end, interruptible("the same command continues"):
        arm.train(tmp_path, 9, say)
    assert end.value.code == 143
    assert arm.log.read_text().splitlines()[-1] == "saved"
    assert "the same command continues" in capsys.readouterr().err
    check_free(arm.folder)


def test_echoes_are_no_second_wish(monkeypatch):
    """Ctrl-C reaches a child by its terminal and by its parent; only later signals are urgent."""
    killed = []
    monkeypatch.setattr(interrupt.os, "kill", lambda pid, number: killed.append((pid, number)))
    handler = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.signal is None and stop.agreed(None) is None
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGINT and stop.agreed(None) == signal.SIGINT
        assert killed == []
        monkeypatch.setattr(interrupt, "SAME_REQUEST", 0.0)
        signal.raise_signal(signal.SIGTERM)
        assert killed == [(os.getpid(), signal.SIGTERM)]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_workers_end_with_their_parent_and_not_with_the_process_group():
    with StopRequest():
        worker = os.fork()
        if worker == 0:
            signal.raise_signal(signal.SIGINT)
            other = os.fork()  # a process that is not the parent
            if other == 0:
                os.kill(os.getppid(), signal.SIGTERM)
                os._exit(0)
            os.waitpid(other, 0)
            time.sleep(60)
            os._exit(9)
        time.sleep(0.5)
        assert os.waitpid(worker, os.WNOHANG) == (0, 0)
        os.kill(worker, signal.SIGTERM)
        assert os.waitpid(worker, 0)[1] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_program_ends_with_one_line_and_the_status_of_its_signal(number, capsys):
    with pytest.raises(SystemExit) as end, interruptible("the same command continues"):
        signal.raise_signal(number)
    assert end.value.code == 128 + number
    assert capsys.readouterr().err == "\ninterrupted; the same command continues\n"


@pytest.mark.parametrize(
    "argv, expected",
    [
        (
            ["t.py", "--config-file", "c.py", "a=[1, 2]"],
            "t.py --resume --config-file c.py 'a=[1, 2]'",
        ),
        (["t.py", "--resume", "a=1"], "t.py --resume a=1"),
    ],
)
def test_the_command_that_goes_on(monkeypatch, argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    assert resume_command() == f"{sys.executable} {expected}"
