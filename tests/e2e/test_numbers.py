"""Bad numbers and the watchdog in whole runs from their configs."""

import json

import torch

from sharedkd import IdenticalLayer


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
    assert finals[0]["trainer"]["bad_steps"] == dict(in_a_row=0, total=1)
    for name, x in finals[0]["model"].items():
        assert torch.isfinite(x).all() and torch.equal(x, finals[1]["model"][name]), name
