"""Whatever is wrong is said in one line, before anything is written."""

import json
import subprocess

import pytest
import tiny
import torch
from detectron2.config import LazyConfig, instantiate
from tiny import arguments, command

from sharedkd import ConfigError
from sharedkd.engine import run

MISSING = "/no/such/file"


def edit_json(workspace, tmp_path, change):
    data = json.loads((workspace.shapes / "train.json").read_text())
    data = change(data) or data
    path = tmp_path / "train.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return f"data.train_json={path}"


def first_box(box):
    return lambda data: data["annotations"][0].update(bbox=box)


# name -> (what to do to the overrides, what the message must contain)
CASES = {
    "teacher not in the zoo": (
        ["model.teacher.config=COCO-Detection/nothing.yaml"],
        ["model.teacher.config", "COCO-Detection/nothing.yaml", "model zoo"],
    ),
    "teacher not named": (["model.teacher.config=???"], ["model.teacher.config", "not set"]),
    "teacher without weights": (
        ["model.teacher.weights=null"],
        ["model.teacher.weights", "set it to"],
    ),
    "teacher weights missing": (
        [f"model.teacher.weights={MISSING}.pth"],
        ["model.teacher.weights", MISSING, "no such file"],
    ),
    "student weights missing": (
        [f"train.init_checkpoint={MISSING}.pkl"],
        ["train.init_checkpoint", MISSING, "no such file"],
    ),
    "unknown stage": (["model.stages.crosss.weight=1"], ["model.stages.crosss", "is not a Stage"]),
    "unknown loss": (
        ["model.stages.cross.loss._target_=sharedkd.losses.Nothing"],
        ["sharedkd.losses.Nothing"],
    ),
    "unknown option": (
        ["model.stages.cross.loss.nothing=1"],
        ["model.stages.cross.loss", "nothing"],
    ),
    "unknown part of the config": (["optimzer.lr=1"], ["optimzer", "optimizer"]),
    "unknown nested key": (["train.amp.enabld=True"], ["train.amp.enabld", "enabled"]),
    "a value to be quoted": (["data.train_json=a(1).json"], ["a(1).json", "'value'"]),
    "unknown distance": (["model.stages.cross.loss.distance=mes"], ["distance", "mes", "mse, l1"]),
    "unknown share": (["model.stages.identical.loss.share=all"], ["share", "all", "dense"]),
    "unknown direction": (["model.stages.cross.loss.direction=up"], ["direction", "up", "mutual"]),
    "stride not there": (
        ["model.stages.identical.loss.strides=[4,128]"],
        ["model.stages.identical.loss.strides", "[4, 128]", "[128]"],
    ),
    "negative weight": (
        ["model.stages.identical.weight=-1"],
        ["model.stages.identical.weight", "-1"],
    ),
    "end before start": (
        ["model.stages.identical.start=9", "model.stages.identical.end=3"],
        ["model.stages.identical.end", "start=9"],
    ),
    "image formats": (["dataloader.train.mapper.image_format=BGR"], ["image_format", "BGR", "RGB"]),
    "device": (["train.device=cuda:77"], ["train.device", "cuda:77", "train.device=cpu"]),
    "device name": (["train.device=gpu"], ["train.device", "gpu"]),
    "float16 on the CPU": (
        ["train.amp.enabled=True", "train.amp.dtype=float16"],
        ["train.amp.dtype", "float16", "bfloat16"],
    ),
    "amp type": (["train.amp.enabled=True", "train.amp.dtype=int8"], ["train.amp.dtype", "int8"]),
    "part to inherit": (["train.inherit=[tail]"], ["train.inherit", "tail", "neck"]),
    "accumulate": (["train.accumulate=0"], ["train.accumulate", "0"]),
    "data not named": (["data.val_json=null"], ["data.val_json", "not set"]),
    "json missing": ([f"data.train_json={MISSING}"], ["data.train_json", MISSING]),
    "images missing": ([f"data.train_images={MISSING}"], ["data.train_images", MISSING]),
    "override without value": (["train.max_iter"], ["override", "train.max_iter", "key=value"]),
    "override below a number": (["train.max_iter.x=1"], ["override", "train.max_iter.x"]),
    "truncated json": (lambda data: '{"images": [', ["data.train_json"]),
    "json without annotations": (lambda data: {"images": []}, ["data.train_json"]),
    "no images": (lambda data: data.update(images=[], annotations=[]), ["data.train_json"]),
    "box outside its image": (first_box([500, 500, 9, 9]), ["data.train_json", "annotation"]),
    "zero-area box": (first_box([5, 5, 0, 9]), ["data.train_json", "annotation"]),
    "box of three numbers": (first_box([5, 5, 9]), ["data.train_json", "annotation"]),
    "image file missing": (
        lambda data: data["images"][0].update(file_name="gone.png"),
        ["data.train_images", "gone.png"],
    ),
    "classes differ": (lambda data: data["categories"][0].update(name="blob"), ["data.", "blob"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_that_names_the_key(workspace, tmp_path, case):
    change, expected = CASES[case]
    opts = change if isinstance(change, list) else [edit_json(workspace, tmp_path, change)]
    output = tmp_path / "run"
    args = arguments(
        "custom_coco_mask.py", *workspace.data, *workspace.pair, f"train.output_dir={output}", *opts
    )
    with pytest.raises(ConfigError) as error:
        run(args)
    message = str(error.value)
    assert "\n" not in message and message.count(": ") >= 1 and "; " in message
    for word in expected:
        assert word in message
    assert not output.exists()


def test_no_stride_in_common(workspace, tmp_path):
    """A teacher with one level, of stride 4, and a RetinaNet, whose levels begin at stride 8."""
    config = tmp_path / "teacher.py"
    config.write_text(
        f"import sys; sys.path.insert(0, {str(tiny.ROOT / 'tests')!r})\n"
        "import tiny\nmodel = tiny.node('faster_rcnn')\n"
        "model.backbone.update(in_features=['res2'], top_block=None)\n"
    )
    weights = tmp_path / "teacher.pth"
    torch.save({"model": instantiate(LazyConfig.load(str(config)).model).state_dict()}, weights)
    args = arguments(
        "custom_coco_retinanet.py",
        *workspace.data,
        f"model.teacher.config={config}",
        f"model.teacher.weights={weights}",
        f"train.output_dir={tmp_path}/run",
    )
    with pytest.raises(ConfigError, match="model.stages.identical.*no stride in common") as error:
        run(args)
    assert "[8, 16, 32, 64, 128]" in str(error.value) and "[4]" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_architecture(workspace, tmp_path):
    path = tmp_path / "r50.pth"
    torch.save({"model": tiny.detector("retinanet", 50).state_dict()}, path)
    for key in ("model.teacher.weights", "train.init_checkpoint"):
        args = arguments("custom_coco_mask.py", *workspace.data, *workspace.pair, f"{key}={path}")
        with pytest.raises(ConfigError, match=f"{key}={path}.*(fit|made for another)"):
            run(args)


def test_weights_without_a_run_are_not_overwritten(workspace, tmp_path):
    (tmp_path / "model_final.pth").write_bytes(b"precious")
    opts = [*workspace.data, *workspace.pair, f"train.output_dir={tmp_path}"]
    for flags in ([], ["--resume"]):
        with pytest.raises(ConfigError, match="train.output_dir=.*holds model_final.pth"):
            run(arguments("custom_coco_mask.py", *opts, flags=flags))
    assert [p.name for p in tmp_path.iterdir()] == ["model_final.pth"]
    assert (tmp_path / "model_final.pth").read_bytes() == b"precious"


def test_a_polygon_outside_its_image(workspace, tmp_path):
    def move(data):
        data["annotations"][0]["segmentation"] = [[500, 500, 510, 500, 510, 510]]

    opts = [*workspace.data, *workspace.pair, edit_json(workspace, tmp_path, move)]
    with pytest.raises(ConfigError, match="polygon that lies outside its"):
        run(arguments("custom_coco_mask.py", *opts, f"train.output_dir={tmp_path}/run"))


def test_unreadable_weights(workspace, tmp_path):
    path = tmp_path / "torn.pth"
    path.write_bytes(workspace.weights.read_bytes()[:1000])
    args = arguments(
        "custom_coco_mask.py", *workspace.data, *workspace.pair, f"model.teacher.weights={path}"
    )
    with pytest.raises(ConfigError, match="model.teacher.weights=.*torn.pth: cannot be read"):
        run(args)


def test_the_command_line_exits_with_one_line_and_leaves_another_run_alone(workspace, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "last_checkpoint").write_text("model_0000001.pth")
    (output / "config.yaml").write_text("another run's")
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    opts = [*workspace.data, *workspace.pair, f"train.output_dir={output}"]

    first = subprocess.run(command("custom_coco_mask.py", *opts), capture_output=True, text=True)
    assert first.returncode == 1
    assert first.stderr.strip().splitlines()[-1].startswith("error: train.output_dir=")
    assert "--resume" in first.stderr
    assert "Traceback" not in first.stderr + first.stdout

    wrong = subprocess.run(
        command(
            "custom_coco_mask.py", *opts, f"model.teacher.weights={MISSING}", flags=["--resume"]
        ),
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 1 and "model.teacher.weights" in wrong.stderr
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before


def test_images_without_objects_train(workspace, tmp_path):
    def keep_one(data):
        data["annotations"] = data["annotations"][:1]

    opts = [edit_json(workspace, tmp_path, keep_one), f"train.output_dir={tmp_path}/run"]
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


def test_compiling_and_recomputing_exclude_each_other(train):
    with pytest.raises(ConfigError, match="train.compile=True: excludes.*use one of them"):
        train("custom_coco.py", "train.compile=True", "train.activation_checkpointing=True")


def test_activation_checkpointing_trains_the_same_student(train, tmp_path):
    runs = [
        train("custom_coco.py", f"train.activation_checkpointing={on}", output=tmp_path / on)[0]
        for on in ("True", "False")
    ]
    ours, plain = (torch.load(run / "model_final.pth", weights_only=False)["model"] for run in runs)
    for name, x in plain.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-3, atol=1e-4)
