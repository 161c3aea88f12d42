"""A longer run needs no more memory and no more open files at its end than halfway."""

import json
import os
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

STEPS = int(os.environ.get("STEPS", 400))


def children(process):
    return [int(x) for x in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def usage(process):
    """(resident MB, open files) of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 2**10, len(os.listdir(f"/proc/{process}/fd"))


def wait_for(iteration, metrics, process):
    def reached():
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        return len(rows) > 1 and json.loads(rows[-2])["iteration"] >= iteration

    while not reached():
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.2)


def test_memory_and_open_files_do_not_grow(start, tmp_path):
    """Between the two measurements lie checkpoints and evaluations, too."""
    folder = tmp_path / "run"
    period = STEPS // 8
    process = start(
        folder,
        f"train.max_iter={STEPS}",
        "train.log_period=5",
        f"train.checkpointer.period={period}",
        "train.checkpointer.max_to_keep=1",
        f"train.eval_period={period}",
    )
    measured = []
    for iteration in (STEPS // 2, STEPS - 15):
        wait_for(iteration, folder / "metrics.json", process)
        pids = [process.pid, *children(process.pid)[:1]]  # the run, and what loads its images
        assert len(pids) == 2
        measured.append([usage(pid) for pid in pids])
    assert process.wait() == 0, start.console.read_text()
    # A leak of one file or one image a step would be hundreds of files; maps are 0.4 MB a step.
    print(measured)
    for (mb, files), (mb_end, files_end) in zip(*measured):
        assert files_end - files < STEPS / 10, measured
        assert mb_end - mb < 0.05 * STEPS, measured
    logs = [*folder.glob("log.txt*"), *folder.glob("*.json"), *folder.glob("events*")]
    assert sum(x.stat().st_size for x in logs) < 2000 * STEPS
