"""A whole run with images without labels: counted, resumed in the same bytes, refused where nothing learns."""

import json
import shutil

import pytest
import tiny
import torch

from sharedkd import ConfigError
from sharedkd.lab.preflight import as_text, preflight
from sharedkd.lab.shapes import make_shapes

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_run_with_images_without_labels(workspace, train, tmp_path):
    more = make_shapes(tmp_path / "more", train=5, val=1, size=(64, 64), seed=9)
    keys = [
        f"data.unlabelled_images=[{more}/train,{workspace.shapes}/train]",
        "data.unlabelled_ratio=0.5",
        *("train.checkpointer.period=2", "dataloader.evaluator=null"),
    ]
    whole, _ = train("custom_coco.py", *keys, "train.max_iter=4")
    log = (whole / "log.txt").read_text()
    said = (
        "images without labels: 5, 1 more in each iteration, 0.8 epochs; for the stages identical"
    )
    assert said in log and "12 of 17 images are trained on with their labels" in log
    assert json.loads((whole / "run.json").read_text())["unlabelled_images"] == 5
    every = [*workspace.data, *workspace.pair, *keys, f"train.output_dir={tmp_path / 'none'}"]
    found = preflight(str(tiny.ROOT / "configs/custom_coco.py"), every, measure=False)
    assert found["unlabelled"]["images"] == 5 and said in as_text(found)

    half = tmp_path / "half"
    shutil.copytree(whole, half)
    (half / "model_final.pth").unlink()
    (half / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(ConfigError, match="dataloader.train.unlabelled_ratio=not set: was 0.5"):
        train("custom_coco.py", "train.max_iter=4", output=half, flags=["--resume"])
    train("custom_coco.py", *keys, "train.max_iter=4", output=half, flags=["--resume"])
    ends = [torch.load(x / "model_final.pth", weights_only=False)["model"] for x in (whole, half)]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])

    (more / "train" / sorted(x.name for x in (more / "train").iterdir())[0]).unlink()
    train("custom_coco.py", *keys, "train.max_iter=5", output=half, flags=["--resume"])
    log = (half / "log.txt").read_text()
    assert "resumes with 4 images without labels, which were 5" in log
    # A ratio that is no whole number of images:
    found = preflight(
        str(tiny.ROOT / "configs/custom_coco.py"),
        [*every, "data.unlabelled_ratio=0.7"],
        measure=False,
    )
    (warning,) = (x for x in found["warnings"] if x["key"] == "data.unlabelled_ratio")
    assert "is 1.4 images a batch: 1 are taken" in warning["problem"]

    for config, method, problem in (
        (
            "custom_coco_plain.py",
            "",
            "nothing learns from them without distillation; label them by",
        ),
        (
            "custom_coco.py",
            "distill.method=fgd",
            "no stage learns from them: fgd; label them by",
        ),
    ):
        with pytest.raises(ConfigError, match=f"^data.unlabelled_images=.*: {problem}"):
            train(config, *keys, *filter(None, [method]), output=tmp_path / "refused")
    plain = str(tiny.ROOT / "configs/custom_coco_plain.py")
    every = [*workspace.data, *keys, f"train.output_dir={tmp_path / 'none'}"]
    (error,) = preflight(plain, every, measure=False)["errors"]
    assert error["key"] == "data.unlabelled_images"
