"""tools/demo.py from end to end, on a handful of tiny images."""

import contextlib
import io
import os
from pathlib import Path
from unittest import mock

import pytest
import records
import tiny
import torch

from sharedkd.errors import ConfigError
from sharedkd.lab.demo import TITLES, run_demo
from sharedkd.lab.runs import Run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    return [
        f"shapes.root={tmp_path_factory.mktemp('shapes')}",
        "shapes.train=6",
        "shapes.val=3",
        "shapes.size=[64,64]",
        "data.short_edge=[64]",
        "data.test_short_edge=64",
        "train.max_iter=2",
        "train.log_period=1",
        "train.device=cpu",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
    ]


@pytest.fixture(scope="module")
def demo(tmp_path_factory, overrides):
    """(output folder, what the command wrote on the console), started outside the repository."""
    output, console, train = tmp_path_factory.mktemp("demo"), io.StringIO(), Run.train

    def student_here(self, *options):
        """The teacher's run has a process of its own, as all have in a demo."""
        (train if self.folder.name == "teacher" else tiny.train_here)(self, *options)

    with (
        mock.patch.object(Run, "train", student_here),
        contextlib.chdir(output),
        contextlib.redirect_stdout(console),
    ):
        assert tiny.run_tool("demo.py", "--output", output, *overrides) is None
    return output, console.getvalue()


def test_console(demo):
    output, console = demo
    assert all(f"[{number}/5]" in console for number in range(1, 6))
    assert console.count("lazyconfig_train_net.py --config-file") == 3
    assert console.count("iteration 2/2   loss ") == 1  # the teacher's, see above
    assert "one seed" in console
    assert "d2.engine" not in console  # the rest is in console.txt
    assert (output / "table.md").read_text() in console


def test_table(demo):
    rows = records.rows((demo[0] / "table.md").read_text())
    assert [row["model"] for row in rows] == [TITLES[x] for x in ("plain", "sharedkd", "teacher")]
    for row in rows:
        assert float(row["s / image"]) > 0
        for metric in ("AP", "AP50", "AP75", "APs"):
            assert all(0 <= float(row[f"{task} {metric}"]) <= 100 for task in ("box", "mask"))
    plain, distilled, teacher = (int(row["parameters"].replace(",", "")) for row in rows)
    assert teacher > plain == distilled


def test_report(demo, overrides):
    """A folder of runs; the teacher is not taken for a method."""
    output, console = demo
    html = (output / "report.html").read_text()
    assert "Gradient shares" in html and "sharedkd" in html
    assert "data:image/png" in html and TITLES["sharedkd"] in html  # the page of the detections
    assert os.path.relpath(output / "report.html") in console or str(output) in console
    assert "tools/export_student.py --config-file" in console


def test_distilled_checkpoint_is_a_plain_one(demo):
    plain, distilled = (
        torch.load(demo[0] / arm / "model_final.pth", weights_only=False)["model"]
        for arm in ("plain", "sharedkd")
    )
    assert list(plain) == list(distilled)
    assert any(not torch.equal(plain[key], distilled[key]) for key in plain)


def test_second_run_reuses_everything(demo, overrides, capsys):
    output, _ = demo
    before = {arm: (output / arm / "model_final.pth").stat().st_mtime_ns for arm in TITLES}
    rows = records.rows(run_demo(ROOT, output, overrides))
    assert capsys.readouterr().out.count("already finished") == 3
    assert before == {arm: (output / arm / "model_final.pth").stat().st_mtime_ns for arm in TITLES}
    first = records.rows((output / "table.md").read_text())
    assert [row["box AP"] for row in rows] == [row["box AP"] for row in first]


def test_other_settings_are_refused(demo, overrides):
    with pytest.raises(ConfigError, match="other settings"):
        run_demo(ROOT, demo[0], [*overrides, "optimizer.lr=0.5"])


def test_student_of_another_teacher_is_refused(demo, overrides):
    teacher = demo[0] / "teacher/model_final.pth"
    times = teacher.stat()
    os.utime(teacher)
    try:
        with pytest.raises(ConfigError, match="another teacher"):
            run_demo(ROOT, demo[0], overrides)
    finally:
        os.utime(teacher, ns=(times.st_atime_ns, times.st_mtime_ns))
