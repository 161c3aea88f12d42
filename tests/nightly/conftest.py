"""The tiny data set of the whole-run tests, and runs in processes of their own."""

import os
import subprocess

import pytest
import tiny
from e2e.conftest import workspace  # noqa: F401


@pytest.fixture
def start(workspace, tmp_path):  # noqa: F811
    """start(folder, *overrides, flags) -> the process of a run, in a group of its own.

    A RetinaNet, whose normaliser is a running mean, with a stage whose loss has parameters; images are
    loaded in a process more.  What it prints is in ``start.console``.
    """
    fitnets = "{_target_:sharedkd.losses.FitNets,tap:fpn}"
    always = [
        *workspace.data,
        *workspace.pair,
        f"model.stages.fitnets={{_target_:sharedkd.modeling.stages.Stage,loss:{fitnets}}}",
        "dataloader.train.num_workers=1",
    ]

    def start(folder, *overrides, flags=()):
        opts = [*always, f"train.output_dir={folder}", *overrides]
        with open(start.console, "a") as console:
            return subprocess.Popen(
                tiny.command("custom_coco_retinanet.py", *opts, flags=flags),
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    start.console = tmp_path / "console.txt"
    return start
