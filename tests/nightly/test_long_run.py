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


def iteration(metrics):
    """The last one that is logged."""
    rows = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(rows[-2])["iteration"] if len(rows) > 1 else -1


def least(process, metrics, start, end):
    """The least that the run, and the process that loads its images, need in these iterations.

    A single look may fall into a step's backward pass, a checkpoint, or a batch that is handed over.
    """
    seen = []
    while iteration(metrics) < end:
        assert process.poll() is None, "the run ended too early"
        if iteration(metrics) >= start:
            loaders = children(process.pid)
            assert len(loaders) >= 1
            seen.append([usage(process.pid), usage(loaders[0])])
        time.sleep(0.05)
    return [[min(x) for x in zip(*one)] for one in zip(*seen)]


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
    metrics = folder / "metrics.json"
    first = least(process, metrics, STEPS // 2, STEPS // 2 + 20)
    last = least(process, metrics, STEPS - 40, STEPS - 20)
    assert process.wait() == 0, start.console.read_text()
    print(f"(MB, open files) of run and loader: {first}, {last}")
    # One file a step more would be hundreds of files; the maps of one step are 0.4 MB.
    for (mb, files), (mb_end, files_end) in zip(first, last):
        assert files_end - files < STEPS / 40, (first, last)
        assert mb_end - mb < 0.05 * STEPS, (first, last)
    logs = [*folder.glob("log.txt*"), *folder.glob("*.json"), *folder.glob("events*")]
    assert sum(x.stat().st_size for x in logs) < 2000 * STEPS
