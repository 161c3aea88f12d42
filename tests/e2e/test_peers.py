"""Whole runs of students that train together: from the config to their checkpoints."""

import shutil

import tiny
import torch
from same import assert_same

from sharedkd.config.load import load
from sharedkd.engine.advice import advise
from sharedkd.engine.parts import assemble
from sharedkd.lab.shapes import CLASSES
from sharedkd.weights.loading import load_trained

CONFIG = """
import sys; sys.path.insert(0, {tests!r})
import tiny
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from sharedkd import SharedKD, Stage
from sharedkd.losses import PKD
from sharedkd.modeling.stages import stage_dict
from sharedkd.modeling.teachers import Peer

cfg = LazyConfig.load({base!r})
dataloader, optimizer, data = cfg.dataloader, cfg.optimizer, cfg.data
lr_multiplier, train = cfg.lr_multiplier, cfg.train
other = L(Peer)(
    student=tiny.node("retinanet", 18, {classes}),
    stages=L(stage_dict)(back=L(Stage)(loss=L(PKD)(strides=[8, 16]), weight="auto")),
    lr_factor=0.5,
    init_checkpoint={initial!r},
)
model = L(SharedKD)(
    student=cfg.model.student,
    stages=L(stage_dict)(mutual=L(Stage)(loss=L(PKD)(strides=[8, 16]), weight=10.0, teacher="other")),
    peers=dict(other=other),
)
"""


def test_peers_from_the_config_to_their_checkpoints(workspace, train, tmp_path):
    """Each has its optimizer group and its files; a resumed run ends in the same bytes."""
    initial = tiny.detector("retinanet", num_classes=len(CLASSES), seed=5)
    torch.save({"model": initial.state_dict()}, tmp_path / "initial.pth")
    config = tmp_path / "plain_peers.py"
    names = dict(tests=str(tiny.ROOT / "tests"), initial=str(tmp_path / "initial.pth"))
    base = str(tiny.ROOT / "configs/custom_coco.py")
    config.write_text(CONFIG.format(base=base, classes=len(CLASSES), **names))
    options = ["train.max_iter=2", "train.checkpointer.period=1", "train.clip_grad_norm=1"]

    parts = assemble(load(str(config), [*workspace.data, f"train.output_dir={tmp_path}/none"]))
    peer = parts.peers["other"].student
    assert_same(dict(initial.state_dict()), dict(peer.state_dict()))
    groups = {}
    for group in parts.optimizer.param_groups:
        groups.setdefault(group["lr"], set()).update(group["params"])
    lr = parts.cfg.optimizer.lr
    learning = [{p for p in x.parameters() if p.requires_grad} for x in (parts.student, peer)]
    assert groups == {lr: learning[0], lr / 2: learning[1]}
    said = {x.key: x.fix for x in advise(parts)}
    assert "use model.student.backbone.bottom_up.stages.norm=BN" in said["train.init_checkpoint"]
    assert "model.peers.other.init_checkpoint" not in said
    parts.peers["other"].init_checkpoint = ""
    said = {x.key: x.fix for x in advise(parts)}
    remedy = "use model.peers.other.student.backbone.bottom_up.stages.norm=BN"
    assert remedy in said["model.peers.other.init_checkpoint"]

    whole, _ = train(str(config), *options, output=tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "part")
    for name in ("model_final.pth", "peers/other.pth"):
        (tmp_path / "part" / name).unlink()
    (tmp_path / "part/last_checkpoint").write_text("model_0000000.pth")
    train(str(config), *options, output=tmp_path / "part", flags=["--resume"])
    final, other = (
        [torch.load(tmp_path / run / name, weights_only=False) for run in ("whole", "part")]
        for name in ("model_final.pth", "peers/other.pth")
    )
    assert_same(*other)
    assert_same(*({k: x[k] for k in x if k != "trainer"} for x in final))
    assert_same(*(x["trainer"]["optimizer"] for x in final))
    assert final[0]["model"].keys() == parts.student.state_dict().keys()
    load_trained(peer, str(whole / "peers/other.pth"), "peer")  # a plain detector's, complete
    logged = (whole / "metrics.json").read_text()
    for name in ("loss_cls", "peer/other/loss_cls", "peer/other/factor/back"):
        assert f'"{name}' in logged
    assert "teacher other: RetinaNet" in (whole / "log.txt").read_text()
