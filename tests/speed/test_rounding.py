"""Layers that compute in float32 and round, as instructions for 16 bits do."""

import copy

import pytest
import tiny
import torch
from detectron2.layers import Conv2d
from torch import nn

from sharedkd.speed.rounding import round_layers
from sharedkd.teacher import FrozenTeacher

LAYERS = {
    "conv": lambda: Conv2d(24, 16, 3, stride=2, padding=1, activation=nn.functional.relu),
    "grouped": lambda: nn.Conv2d(24, 16, 3, groups=4, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(24, 16, 2, stride=2),
    "linear": lambda: nn.Linear(24, 16),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    return made(request.param)


def made(kind):
    torch.manual_seed(0)
    return LAYERS[kind]().requires_grad_(False), torch.randn(2, 24, 24, 24)


def test_numbers_are_those_of_float64_rounded(layer_and_input):
    """Rounded factors, exact sums, rounded results: the sums of float32 tip few of them over."""
    layer, x = layer_and_input
    exact = copy.deepcopy(layer).bfloat16().double()
    expected = exact(x.bfloat16().double())
    assert round_layers(layer, torch.bfloat16) == 1
    found = layer(x)
    assert found.dtype is torch.bfloat16
    assert (found != expected.bfloat16()).float().mean() < 1e-3
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", ["conv", "grouped", "linear"])  # PyTorch rounds the other twice
def test_they_agree_with_those_of_pytorch(kind):
    layer, x = made(kind)
    expected = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    round_layers(layer, torch.bfloat16)
    found = layer(x.bfloat16())
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-2)
    assert (found != expected).float().mean() < 0.02


def test_autocast_around_it_changes_nothing(layer_and_input):
    layer, x = layer_and_input
    round_layers(layer, torch.bfloat16)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_a_copy_computes_with_its_own_weights(layer_and_input):
    layer, x = layer_and_input
    round_layers(layer, torch.bfloat16)
    expected = layer(x)
    other = copy.deepcopy(layer)
    layer.weight.zero_()
    assert torch.equal(other(x), expected)


def test_a_convolution_with_a_norm_is_left_as_it_is():
    conv = Conv2d(8, 8, 1, norm=nn.BatchNorm2d(8)).eval().requires_grad_(False)
    conv.norm.running_var.uniform_(0.5, 2)
    before = {name: x.clone() for name, x in conv.state_dict().items()}
    x = torch.randn(1, 8, 4, 4)
    expected = conv(x)
    assert round_layers(conv, torch.bfloat16) == 0
    assert all(torch.equal(x, before[name]) for name, x in conv.state_dict().items())
    assert torch.equal(conv(x), expected)


@pytest.mark.parametrize("family", ["faster_rcnn", "mask_rcnn", "retinanet", "fcos"])
def test_whole_teachers_deviate_as_with_instructions(family, monkeypatch):
    """By as much, though in other places: what is rounded upwards differs from the second layer on."""
    errors, scores = [], []
    for there in (True, False):
        monkeypatch.setattr("sharedkd.teacher.has_bfloat16", lambda there=there: there)
        teacher = FrozenTeacher(tiny.detector(family, seed=1), "", "RGB", precision="bfloat16")
        errors.append(teacher.prepare())
        (found,) = teacher.predict([tiny.record(seed=1)], "RGB")
        scores.append(found["instances"].scores[:5].float())
    with_instructions, without = errors
    for stride, x in without.items():
        assert 0.5 < x / with_instructions[stride] < 2, stride
    torch.testing.assert_close(*scores, rtol=0.05, atol=0.01)
