"""A backbone that is compiled, or that recomputes its activations, gives the same results."""

import copy

import pytest
import tiny
import torch
from detectron2.utils.events import EventStorage
from torch.autograd.graph import saved_tensors_hooks

from sharedkd import ConfigError
from sharedkd.modeling.backbones import compile_backbone, recompute_blocks


def step(model):
    """(losses, gradients, buffers, numbers kept for the backward pass)"""
    kept = [0]

    def keep(x):
        kept[0] += x.numel()
        return x

    torch.manual_seed(0)
    model.train()
    with EventStorage(0), saved_tensors_hooks(keep, lambda x: x):
        losses = model(tiny.batch())
        sum(losses.values()).backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, dict(model.named_buffers()), kept[0]


@pytest.mark.parametrize("family, norm", [("faster_rcnn", "BN"), ("retinanet", "FrozenBN")])
def test_a_step_is_the_same_and_keeps_less(family, norm):
    node = tiny.node(family)
    node.backbone.bottom_up.stages.norm = norm
    torch.manual_seed(0)
    plain = tiny.instantiate(node)
    other = copy.deepcopy(plain)
    assert recompute_blocks(other) == 9  # eight of ResNet-18, and its stem
    (losses, gradients, buffers, kept), again = step(plain), step(other)
    assert all(torch.equal(again[0][k], x) for k, x in losses.items())
    assert gradients.keys() == again[1].keys()
    for name, x in gradients.items():
        torch.testing.assert_close(again[1][name], x, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(again[2][k], x) for k, x in buffers.items())
    assert again[3] < kept
    assert other.state_dict().keys() == plain.state_dict().keys()


def test_frozen_blocks_are_left_alone():
    model = tiny.detector("faster_rcnn")
    model.backbone.bottom_up.freeze(3)  # the stem and the first two stages
    assert recompute_blocks(model) == 4


def test_a_backbone_without_blocks_is_refused():
    model = tiny.detector("faster_rcnn")
    model.backbone.requires_grad_(False)
    with pytest.raises(
        ConfigError, match="train.activation_checkpointing=True: .*no residual blocks"
    ):
        recompute_blocks(model)


def test_compiling_a_detector_without_a_backbone_is_refused():
    with pytest.raises(ConfigError, match="model.teacher.compile=True: Linear has no backbone"):
        compile_backbone(torch.nn.Linear(1, 1), key="model.teacher.compile")


@pytest.mark.nightly
def test_a_compiled_backbone_takes_images_of_all_sizes():
    plain = tiny.detector("retinanet").eval()
    model = copy.deepcopy(plain)
    compile_backbone(model, backend="aot_eager")  # traces as the default does, without a compiler
    assert model.state_dict().keys() == plain.state_dict().keys()
    for size in ((64, 64), (96, 128)):
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected, found = plain.backbone(image), model.backbone(image)
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-4)
