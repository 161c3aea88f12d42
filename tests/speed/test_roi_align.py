"""RoIAlign by listed positions: torchvision's numbers and gradients, for every kind of region."""

import copy

import pytest
import tiny
import torch
from detectron2.layers import ROIAlign
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sharedkd.speed.roi_align import list_positions, use_listed_positions


def both(layer, x, rois):
    """[output, gradient of a weighted sum] of torchvision's layer and of the changed one."""
    listed = copy.deepcopy(layer).train()
    assert use_listed_positions(listed) == 1
    found = []
    for each in (layer, listed):
        leaf = x.clone().requires_grad_()
        y = each(leaf, rois)
        weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        found.append([y, *torch.autograd.grad((y * weight).sum(), leaf)])
    assert type(listed) is not ROIAlign
    return found


def regions(count, width, height, draw, spread=1.0):
    """``count`` regions of two images in pixels: within them, beside them, flat and turned inside out."""
    size = torch.tensor([width, height], dtype=torch.float64)
    corner = (torch.rand(count, 2, generator=draw, dtype=torch.float64) * 1.6 - 0.3) * size
    extent = (torch.rand(count, 2, generator=draw, dtype=torch.float64) * 1.3 - 0.1) * spread * size
    images = torch.randint(0, 2, (count, 1), generator=draw).double()
    return torch.cat([images, corner, corner + extent], 1)


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(0, 12),
    size=st.tuples(st.integers(1, 12), st.integers(1, 17)),
    output_size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    scale=st.sampled_from([1.0, 0.25, 1 / 16]),
    sampling_ratio=st.integers(0, 3),
    aligned=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_torchvisions_numbers(count, size, output_size, scale, sampling_ratio, aligned, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, *size, generator=draw, dtype=torch.float64)
    rois = regions(count, size[1] / scale, size[0] / scale, draw)
    expected, found = both(ROIAlign(output_size, scale, sampling_ratio, aligned), x, rois)
    for a, b in zip(expected, found):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_types_and_memory_layouts(dtype, layout):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 20, 26, generator=draw).to(dtype, memory_format=layout)
    rois = regions(50, 100, 80, draw, spread=0.3).float()
    expected, _ = both(ROIAlign(7, 0.25, 0, True), x.float(), rois.float())
    listed = ROIAlign(7, 0.25, 0, True)
    use_listed_positions(listed)
    leaf = x.clone().requires_grad_()
    y = listed(leaf, rois)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((y * weight).sum(), leaf)
    assert y.dtype == gradient.dtype == dtype
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    for a, b in zip(expected, (y, gradient)):
        assert (b.float() - a).abs().max() < tolerance * a.abs().max()


def test_one_bin_by_hand():
    # Of a map 2 x 2, the region from (0.5, 0.5) to (1.5, 1.5) is one bin whose one sample lies at
    # (0.5, 0.5) between the centres: a quarter of each.
    rois = torch.tensor([[0.0, 0.5, 0.5, 1.5, 1.5]])
    positions, weights, starts = list_positions(rois, (2, 2), (1, 1), 1.0, 0, aligned=True)
    assert positions.tolist() == [0, 1, 2, 3] and starts.tolist() == [0]
    assert weights.tolist() == [0.25, 0.25, 0.25, 0.25]
    # One position wide, in the second image: rows 2 * 2 + 0 and the one below it.
    rois = torch.tensor([[1.0, 0.0, 0.5, 1.0, 1.5]])
    positions, weights, _ = list_positions(rois, (2, 2), (1, 1), 1.0, 0, aligned=True)
    assert positions.tolist() == [4, 6] and weights.tolist() == [0.5, 0.5]


def test_only_training_is_changed_and_broken_boxes_are_left_to_torchvision(monkeypatch):
    layer = ROIAlign(2, 1.0, 0, True)
    x, rois = torch.randn(1, 1, 4, 4), torch.tensor([[0.0, 0.3, 0.2, 3.0, 2.0]])
    broken = torch.tensor([[0.0, float("nan"), 0.0, 1.0, 1.0]])
    expected = layer(x, rois)
    use_listed_positions(layer)

    def fail(*args):
        raise AssertionError("lists positions")

    monkeypatch.setattr("sharedkd.speed.roi_align.list_positions", fail)
    assert torch.equal(layer.eval()(x, rois), expected)
    layer.train()(x, broken)
    with pytest.raises(AssertionError, match="lists"):
        layer(x, rois)


def test_other_layers_and_subclasses_stay():
    class Own(ROIAlign):
        pass

    network = nn.Sequential(Own(2, 1.0, 0), nn.Conv2d(1, 1, 1))
    assert use_listed_positions(network) == 0
    assert type(network[0]) is Own


@pytest.mark.parametrize("family", ["faster_rcnn", "mask_rcnn"])
def test_a_detectors_step_is_the_same(family):
    torch.manual_seed(0)
    plain = tiny.instantiate(tiny.node(family)).train()
    listed = copy.deepcopy(plain)
    levels = sum(type(m) is ROIAlign for m in plain.modules())
    assert use_listed_positions(listed) == levels >= 4
    losses = []
    for model in (plain, listed):
        torch.manual_seed(0)
        with EventStorage(0):
            losses.append(model(tiny.batch()))
        sum(losses[-1].values()).backward()
    for name, x in losses[0].items():
        torch.testing.assert_close(losses[1][name], x, rtol=1e-5, atol=1e-6)
    there = dict(listed.named_parameters())
    for name, p in plain.named_parameters():
        assert (there[name].grad - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-7, name
