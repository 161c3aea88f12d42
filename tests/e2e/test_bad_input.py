"""What preflight's table cannot show: input that looks bad and is fine, and what only training finds.

The ways to be refused are in tests/misconfigurations.py, see test_preflight.py.
"""

import json

import pytest
import torch
from tiny import arguments

from sharedkd import ConfigError
from sharedkd.engine.run import run


def test_weights_without_a_run_are_not_overwritten(workspace, tmp_path):
    (tmp_path / "model_final.pth").write_bytes(b"precious")
    opts = [*workspace.data, *workspace.pair, f"train.output_dir={tmp_path}"]
    for flags in ([], ["--resume"]):
        with pytest.raises(ConfigError, match="train.output_dir=.*holds model_final.pth"):
            run(arguments("custom_coco_mask.py", *opts, flags=flags))
    assert [p.name for p in tmp_path.iterdir()] == ["model_final.pth"]
    assert (tmp_path / "model_final.pth").read_bytes() == b"precious"


def test_images_without_objects_train(workspace, tmp_path):
    data = json.loads((workspace.shapes / "train.json").read_text())
    data["annotations"] = data["annotations"][:1]
    (tmp_path / "train.json").write_text(json.dumps(data))
    opts = [f"data.train_json={tmp_path}/train.json", f"train.output_dir={tmp_path}/run"]
    run(
        arguments(
            "custom_coco_mask.py", *workspace.data, *workspace.pair, *opts, "train.max_iter=3"
        )
    )
    assert (tmp_path / "run/model_final.pth").exists()


def test_a_loss_that_is_not_finite_stops_the_run(workspace, tmp_path, monkeypatch):
    from sharedkd import IdenticalLayer, NonFiniteLossError

    forward, calls = IdenticalLayer.forward, []

    def poisoned(self, batch):
        calls.append(1)
        terms = forward(self, batch)
        if len(calls) == 3:
            terms["s16"] = terms["s16"] * float("nan")
        return terms

    monkeypatch.setattr(IdenticalLayer, "forward", poisoned)
    output = tmp_path / "run"
    opts = [f"train.output_dir={output}", "train.checkpointer.period=2"]
    with pytest.raises(NonFiniteLossError, match="iteration 2.*distill/identical/s16=nan"):
        run(arguments("custom_coco_mask.py", *workspace.data, *workspace.pair, *opts))
    assert (output / "last_checkpoint").read_text() == "model_0000001.pth"
    saved = torch.load(output / "model_0000001.pth", weights_only=False)["model"]
    assert all(torch.isfinite(x).all() for x in saved.values() if x.is_floating_point())


def test_activation_checkpointing_trains_the_same_student(train, tmp_path):
    runs = [
        train("custom_coco.py", f"train.activation_checkpointing={on}", output=tmp_path / on)[0]
        for on in ("True", "False")
    ]
    ours, plain = (torch.load(run / "model_final.pth", weights_only=False)["model"] for run in runs)
    for name, x in plain.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-3, atol=1e-4)
