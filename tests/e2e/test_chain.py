"""tools/distill_chain.py: two tiny links, each the teacher of the next."""

import os

import tiny

from sharedkd.lab.runs import Run
from sharedkd.lab.shapes import CLASSES

CONFIG = """
import sys; sys.path.insert(0, {tests!r})
import tiny
from detectron2.config import LazyConfig

cfg = LazyConfig.load({base!r})
dataloader, optimizer, data = cfg.dataloader, cfg.optimizer, cfg.data
lr_multiplier, train = cfg.lr_multiplier, cfg.train
model = tiny.node({family!r}, 18, {classes})
"""


def test_each_link_teaches_the_next(workspace, tmp_path, monkeypatch, capsys):
    trained = []

    def train(self, *options):
        trained.append(self.folder.name)
        tiny.train_here(self, *options)

    monkeypatch.setattr(Run, "train", train)
    for family in ("retinanet", "faster_rcnn"):
        names = dict(tests=str(tiny.ROOT / "tests"), classes=len(CLASSES), family=family)
        base = str(tiny.ROOT / "configs/custom_coco_plain.py")
        (tmp_path / f"{family}.py").write_text(CONFIG.format(base=base, **names))
    output = tmp_path / "chain"
    students = ",".join(str(tmp_path / f"{x}.py") for x in ("retinanet", "faster_rcnn"))
    command = ["distill_chain.py", "--teacher", workspace.root / "teacher.py"]
    command += ["--teacher-weights", workspace.weights, "--students", students, "--method", "pkd"]
    command += ["--output", output, *workspace.data, "train.max_iter=1"]

    # Both are checked before the first is trained.
    broken = [*command, "--method", "dkd"]
    assert "model.stages.dkd" in tiny.run_tool(*broken) and not trained and not output.exists()

    assert tiny.run_tool(*command) is None
    first, second = output / "1_retinanet", output / "2_faster_rcnn"
    assert trained == [first.name, second.name]
    assert f"weights: {workspace.weights}, verified" in (first / "log.txt").read_text()
    assert f"{first / 'model_final.pth'}, verified" in (second / "log.txt").read_text()
    table = (output / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("\n") == 4 and "box AP" in table and "faster_rcnn.py" in table
    assert (output / "report.html").is_file()

    assert tiny.run_tool(*command) is None and len(trained) == 2  # both are kept
    os.utime(first / "model_final.pth")  # the first link has been trained again since
    assert "2_faster_rcnn: holds a student of another teacher" in tiny.run_tool(*command)
    assert "holds a run with other settings" in tiny.run_tool(*command, "optimizer.lr=0.5")
