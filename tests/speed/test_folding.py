"""Folding of frozen batch norms: equal maps, nothing left to fold, nothing folded that must not be."""

import copy

import pytest
import tiny
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from detectron2.utils.events import EventStorage
from torch import nn

from sharedkd.speed.folding import NORMS, fold_in_training, fold_norms


def statistics(module, seed=0):
    """Give all norms statistics, scales and shifts that change something."""
    draw = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, NORMS):
            for tensor, low, high in (
                (norm.running_mean, -1.0, 1.0),
                (norm.running_var, 0.2, 3.0),
                (norm.weight, 0.5, 2.0),
                (norm.bias, -1.0, 1.0),
            ):
                tensor.data.uniform_(low, high, generator=draw)
    return module


def wrapped(norm, bias=False):
    conv = Conv2d(3, 8, 3, bias=bias, norm=norm(8), activation=nn.functional.relu)
    return nn.Sequential(conv, Conv2d(8, 4, 1))


NORM_KINDS = [FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", NORM_KINDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_stay_equal(norm, bias, layout):
    model = statistics(wrapped(norm, bias)).eval().requires_grad_(False).double()
    model.to(memory_format=layout)
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    before = model(x)
    assert fold_norms(model) == 1 and model[0].norm is None
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert model[0].weight.is_contiguous(memory_format=layout)
    assert not any(p.requires_grad for p in model.parameters())
    assert fold_norms(model) == 0


def test_values_of_one_channel():
    norm = nn.BatchNorm2d(1, eps=0.0)
    norm.running_mean[:], norm.running_var[:] = 3.0, 4.0
    norm.weight.data[:], norm.bias.data[:] = 10.0, 1.0
    conv = Conv2d(1, 1, 1, norm=norm)
    conv.weight.data[:], conv.bias.data[:] = 2.0, 5.0
    fold_norms(conv.eval())
    assert conv.weight.item() == 10.0  # 2 * 10 / 2
    assert conv.bias.item() == 11.0  # (5 - 3) * 10 / 2 + 1


def regnet(norm):
    return RegNet(
        stem_class=SimpleStem,
        stem_width=16,
        block_class=ResBottleneckBlock,
        depth=4,
        w_a=24.48,
        w_0=24,
        w_m=2.54,
        group_width=8,
        norm=norm,
        se_ratio=0.25,
        out_features=["s1", "s2"],
    )


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN"])
def test_norms_beside_their_convolutions(norm):
    model = statistics(regnet(norm)).eval().requires_grad_(False).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    before = model(x)
    norms = sum(isinstance(m, NORMS) for m in model.modules())
    assert fold_norms(model) == norms > 10
    assert not any(isinstance(m, NORMS) for m in model.modules())
    for name, y in model(x).items():
        torch.testing.assert_close(y, before[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depth", [18, 50])
def test_detectors_keep_their_maps(depth):
    backbone = statistics(tiny.detector("retinanet", depth)).eval().backbone.requires_grad_(False)
    x = torch.randn(1, 3, 64, 64)
    before = backbone(x)
    assert fold_norms(backbone) >= depth
    for name, y in backbone(x).items():
        error = (y - before[name]).square().mean().sqrt() / before[name].square().mean().sqrt()
        assert error < 1e-5, name


def test_what_depends_on_the_input_stays():
    group = nn.Sequential(Conv2d(3, 32, 1, norm=nn.GroupNorm(4, 32)), nn.Conv2d(32, 4, 1))
    unfixed = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, track_running_stats=False))
    activated = nn.Sequential(Conv2d(3, 8, 1, activation=nn.functional.relu), nn.BatchNorm2d(8))
    apart = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.BatchNorm2d(8))
    hooked = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    hooked[1].register_forward_hook(lambda *args: None)
    for model in (group, unfixed, activated, apart, hooked):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        assert fold_norms(model.eval()) == 0
        after = model.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items())


def test_statistics_that_still_move_are_refused():
    with pytest.raises(ValueError, match="training mode"):
        fold_norms(wrapped(nn.BatchNorm2d).train())


@pytest.mark.parametrize("bias", [False, True])
def test_a_trained_network_keeps_maps_and_gradients(bias):
    draw = torch.Generator().manual_seed(0)
    plain = statistics(wrapped(FrozenBatchNorm2d, bias)).double()
    folded = copy.deepcopy(plain)
    assert fold_in_training(folded) == 1
    assert folded.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64, generator=draw)
    weight = torch.randn(2, 4, 7, 5, dtype=torch.float64, generator=draw)
    gradients = []
    for model in (plain, folded):
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        (y * weight).sum().backward()
        gradients.append([y, inputs.grad, *(p.grad for p in model.parameters())])
    assert len(gradients[0]) == 2 + 3 + bias
    for expected, found in zip(*gradients):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 6), (9, 7)])
@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"stride": (3, 1)}, {"stride": 2, "groups": 2}, {"stride": 2, "padding": 1}],
    ids=str,
)
def test_a_convolution_with_a_stride_keeps_maps_and_gradients(options, size, layout):
    draw = torch.Generator().manual_seed(0)
    plain = statistics(Conv2d(4, 6, 1, norm=FrozenBatchNorm2d(6), **options)).double()
    folded = copy.deepcopy(plain)
    assert fold_in_training(folded) == 1
    x = torch.randn(2, 4, *size, dtype=torch.float64, generator=draw)
    found = []
    for model in (plain, folded):
        inputs = x.clone(memory_format=layout).requires_grad_()
        y = model(inputs)
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        found.append([y, inputs.grad, model.weight.grad])
    for expected, each in zip(*found):
        torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)


def test_a_1x1_convolution_reads_only_what_its_stride_leaves(monkeypatch):
    read = []
    convolve = nn.functional.conv2d
    monkeypatch.setattr(
        nn.functional, "conv2d", lambda x, *args: read.append(x.shape) or convolve(x, *args)
    )
    conv = Conv2d(4, 6, 1, stride=2, norm=FrozenBatchNorm2d(6))
    fold_in_training(conv)
    x = torch.randn(2, 4, 9, 6)
    conv(x)
    conv(x.to(memory_format=torch.channels_last))
    conv.eval()(x)
    for options in ({"stride": 1}, {"stride": 2, "padding": 1}, {"stride": 2, "kernel_size": 3}):
        other = Conv2d(4, 6, **{"kernel_size": 1, **options}, norm=FrozenBatchNorm2d(6))
        fold_in_training(other)
        other(x)
    assert [tuple(shape[2:]) for shape in read] == [(5, 3), *[(9, 6)] * 5]


def frozen(family):
    """A small detector with frozen norms in its backbone."""
    node = tiny.node(family)
    node.backbone.bottom_up.stem.norm = node.backbone.bottom_up.stages.norm = "FrozenBN"
    torch.manual_seed(0)
    model = statistics(tiny.instantiate(node))
    for norm in [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]:
        norm.weight.fill_(0.5)  # random weights would let maps grow from block to block
    return model


def test_a_detectors_step_is_the_same_folded():
    plain = frozen("faster_rcnn")
    folded = copy.deepcopy(plain)
    assert fold_in_training(folded) == 20  # of ResNet-18: 1 + 16 + 3 in shortcuts
    losses = []
    for model in (plain, folded):
        torch.manual_seed(0)
        with EventStorage(0):
            losses.append(model.train()(tiny.batch()))
        sum(losses[-1].values()).backward()
    for name, x in losses[0].items():
        torch.testing.assert_close(losses[1][name], x, rtol=1e-4, atol=1e-5)
    there = dict(folded.named_parameters())
    for name, p in plain.named_parameters():
        error = (there[name].grad - p.grad).norm() / p.grad.norm().clamp(min=1e-6)
        assert error < 1e-2, name


def test_inference_is_untouched_by_folding_in_training():
    model = frozen("retinanet").eval().backbone
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        assert fold_in_training(model) == 20
        assert all(torch.equal(y, before[name]) for name, y in model(x).items())


def test_what_is_no_frozen_norm_is_not_folded_in_training():
    batch_norm, hooked = wrapped(nn.BatchNorm2d), wrapped(FrozenBatchNorm2d)
    hooked[0].norm.register_forward_hook(lambda *args: None)
    assert fold_in_training(batch_norm) == fold_in_training(hooked) == 0
    assert type(batch_norm[0]) is type(hooked[0]) is Conv2d
