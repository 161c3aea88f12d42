"""A full disk ends a run with one clear line, and the last checkpoint stays readable."""

import pytest
import torch
from disks import disk, resize

pytestmark = pytest.mark.nightly

RUN = ("train.max_iter=6", "train.checkpointer.period=1")


def test_a_disk_that_fills_up_during_a_run(start, tmp_path):
    with disk(tmp_path / "disk", "400m") as small:  # room for one or two checkpoints
        folder = small / "run"
        assert start(folder, *RUN).wait() == 1
        said = start.console.read_text()
        (line,) = [x for x in said.splitlines() if x.startswith("error: ")]
        assert "No space left on device" in line and str(folder) in line
        assert "Traceback" not in said
        last = torch.load(folder / (folder / "last_checkpoint").read_text(), weights_only=True)
        assert 0 <= last["iteration"] < 5
        assert last["model"]

        resize(small, "2g")
        assert start(folder, *RUN, flags=["--resume"]).wait() == 0
        assert torch.load(folder / "model_final.pth", weights_only=True)["iteration"] == 5
