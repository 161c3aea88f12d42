"""docs/new_loss.md and docs/own_data.md do what they say, block by block."""

import json
import shlex

import numpy as np
import tiny
import torch
from coco_files import reading_of
from detectron2.data.detection_utils import Image
from detectron2.engine import default_argument_parser

from sharedkd.engine.run import run


def test_the_loss_of_the_page_trains_a_pair(blocks, workspace, tmp_path, monkeypatch, capsys):
    loss, look, config = blocks("new_loss.md", "python")
    for block in (loss, config):
        (tmp_path / block.splitlines()[0].strip('"')).write_text(block)
    (tmp_path / "configs").symlink_to(tiny.ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    exec(compile(look, "new_loss.md", "exec"), {})
    assert capsys.readouterr().out.startswith("{'s8': 0.")

    (command,) = blocks("new_loss.md", "bash")
    words = shlex.split(command.replace("$DATA", "").replace("\\\n", ""))
    flags = words[words.index("tools/lazyconfig_train_net.py") + 1 :]
    tiny_run = [*workspace.data, *workspace.pair, "model.stages.attention.ramp=2"]
    run(default_argument_parser().parse_args([*flags, *tiny_run]))
    lines = (tmp_path / "output/attention/metrics.json").read_text().splitlines()
    metrics = [json.loads(line) for line in lines if "loss_distill_attention" in line]
    assert len(metrics) == 4
    assert metrics[0]["distill/attention/s8"] > 0
    state = torch.load(tmp_path / "output/attention/model_final.pth", weights_only=False)["model"]
    assert state.keys() == tiny.detector("faster_rcnn", 18, 6).state_dict().keys()


def test_the_options_of_the_loss_are_checked(blocks, tmp_path, monkeypatch):
    (tmp_path / "attention_transfer.py").write_text(blocks("new_loss.md", "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    from sharedkd import ConfigError

    scope = {}
    exec(blocks("new_loss.md", "python")[0], scope)
    try:
        scope["AttentionTransfer"](power=0)
    except ConfigError as e:
        assert e.key == "power"
    else:
        raise AssertionError("a power of 0 was taken")


def test_the_json_of_own_data_is_one(blocks, tmp_path):
    (text,) = blocks("own_data.md", "json")
    (tmp_path / "train.json").write_text(text)
    image = json.loads(text)["images"][0]
    pixels = np.zeros((image["height"], image["width"], 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / image["file_name"])
    summary = reading_of(tmp_path / "train.json", tmp_path).files[0]
    assert (summary.images, summary.objects, summary.classes) == (1, 1, ["cell"])
    assert summary.has_masks
