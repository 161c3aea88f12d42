"""Bad numbers and the watchdog in whole runs from their configs."""

import json
import shutil

import torch

from sharedkd import IdenticalLayer
from sharedkd.engine.hooks.record import read_record


def test_a_run_that_skips_a_step_and_is_watched(train, tmp_path, monkeypatch):
    forward = IdenticalLayer.forward
    bad = "train.on_nonfinite=skip_step"
    finals = {}
    for period in (0, 1):
        calls = []

        def poisoned(self, batch):
            calls.append(1)
            terms = forward(self, batch)
            return {k: x * float("nan") for k, x in terms.items()} if len(calls) == 1 else terms

        monkeypatch.setattr(IdenticalLayer, "forward", poisoned)
        output, _ = train(
            "custom_coco_retinanet.py",
            bad,
            f"train.watch_period={period}",
            output=tmp_path / str(period),
        )
        finals[period] = torch.load(output / "model_final.pth", weights_only=False)
        rows = [json.loads(line) for line in open(output / "metrics.json")]
        rows = [row for row in rows if "lr" in row]  # those of training
        assert [row["skipped_steps"] for row in rows] == [1] * 4
        assert all(any("watch/identical/" in k for k in row) == bool(period) for row in rows[1:])
    assert finals[0]["trainer"]["hooks"]["StepLog"] == dict(in_a_row=0, total=1)
    assert read_record(output)["skipped"] == dict(steps=1, images=0)
    for name, x in finals[0]["model"].items():
        assert torch.isfinite(x).all() and torch.equal(x, finals[1]["model"][name]), name


def test_skips_are_recorded_and_counted_on_after_resuming(train, workspace, tmp_path):
    shapes = shutil.copytree(workspace.shapes, tmp_path / "shapes")
    images = sorted((shapes / "train").iterdir())
    for path in images[::2]:
        path.write_bytes(path.read_bytes()[:-40])
    opts = [
        f"data.train_json={shapes}/train.json",
        f"data.train_images={shapes}/train",
        *("dataloader.train.on_bad_image=skip", "dataloader.train.max_bad_images=1.0"),
        f"dataloader.train.total_batch_size={len(images) // 2}",
    ]

    def skipped(end, folder, *flags):
        output, _ = train(
            "custom_coco_plain.py",
            *opts,
            f"train.max_iter={end}",
            output=tmp_path / folder,
            flags=flags,
        )
        return read_record(output)["skipped"]

    whole = skipped(2, "whole")
    first = skipped(1, "stopped")
    assert 0 < first["images"] < whole["images"] and whole["steps"] == 0
    assert skipped(2, "stopped", "--resume") == whole
