"""RegNet backbones, which name their stages s1..s4, are tapped and distilled like ResNets."""

import tiny
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from detectron2.utils.events import EventStorage

from sharedkd import FrozenTeacher, SharedKD


def regnet_faster_rcnn():
    node = tiny.node("faster_rcnn")
    node.backbone.bottom_up = L(RegNet)(
        stem_class=SimpleStem,
        stem_width=32,
        block_class=ResBottleneckBlock,
        depth=13,
        w_a=24.48,
        w_0=24,
        w_m=2.54,
        group_width=16,
        norm="BN",
        out_features=["s1", "s2", "s3", "s4"],
    )
    torch.manual_seed(0)
    return instantiate(node)


def test_regnet_student_and_teacher():
    for student, teacher in (
        (regnet_faster_rcnn(), tiny.detector("mask_rcnn", seed=1)),
        (tiny.detector("retinanet"), regnet_faster_rcnn()),
    ):
        stages = tiny.shared_kd()
        model = SharedKD(
            student=student, teacher=FrozenTeacher(teacher, ""), stages=stages, input_format="RGB"
        ).train()
        with EventStorage():
            losses = model(tiny.batch())
        sum(losses.values()).backward()
        terms = {k for k in losses if k.startswith("distill/cross/")}
        strides = sorted(model.losses["cross"].strides)
        assert len(terms) == len(strides) * (len(strides) - 1) // 2
        assert all(p.grad is None for p in teacher.parameters())
        stem = next(student.backbone.bottom_up.stem.parameters())
        assert stem.grad.any()
