"""Alignment against numbers worked out by hand."""

import pytest
import torch
import torch.nn.functional as F

from sharedkd.losses import alignment
from sharedkd.losses.alignment import Pooled, align, pool_to


def grid(height, width, channels=1):
    """(1, C, H, W): channel c holds 1000 c + row * width + column."""
    plane = torch.arange(height * width, dtype=torch.float32).view(height, width)
    return torch.stack([plane + 1000 * c for c in range(channels)])[None]


def test_a_map_of_the_right_size_is_returned_itself():
    x = grid(3, 4, 2)
    assert pool_to(x, (3, 4)) is x
    a, b = align(x, x.clone())
    assert torch.equal(a, x) and a.data_ptr() == x.data_ptr()
    assert torch.equal(b, x)


def test_larger_is_pooled_and_wider_is_cropped_to_its_first_channels():
    x, y = grid(2, 4, channels=1), grid(1, 2, channels=3)
    a, b = align(x, y)
    assert a.tolist() == [[[[2.5, 4.5]]]]
    assert b.tolist() == [[[[0.0, 1.0]]]]
    b, a = align(y, x)  # the order does not matter
    assert a.tolist() == [[[[2.5, 4.5]]]]
    assert b.tolist() == [[[[0.0, 1.0]]]]


def test_one_taller_other_wider():
    tall, wide = grid(4, 2), grid(2, 4)
    a, b = align(tall, wide)
    assert a.tolist() == [[[[1.0, 2.0], [5.0, 6.0]]]]  # rows of [[0 1] [2 3] [4 5] [6 7]] in pairs
    assert b.tolist() == [[[[0.5, 2.5], [4.5, 6.5]]]]  # columns of [[0 1 2 3] [4 5 6 7]] in pairs


@pytest.mark.parametrize("size", [(4, 4), (3, 4)])
def test_gradient_reaches_only_the_cells_and_channels_used(size):
    x = grid(*size, channels=3).requires_grad_()
    a, _ = align(x, torch.zeros(1, 2, 1, 1))
    a.sum().backward()
    assert torch.allclose(x.grad[:, :2], torch.tensor(1 / (size[0] * size[1])))
    assert not x.grad[:, 2].any()


def test_inputs_are_left_as_they_are():
    x, y = grid(12, 12, 2), grid(2, 2, 3)
    before = x.clone(), y.clone()
    a, _ = align(x, y)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    a += 1  # nor is what comes out a part of what went in
    assert torch.equal(x, before[0])


@pytest.mark.parametrize("size", [(24, 40), (6, 10), (2, 3), (24, 20)])
def test_a_map_pooled_on_the_way_has_the_same_numbers(size):
    x = torch.randn(2, 3, 24, 40, dtype=torch.float64, requires_grad=True)
    pool = Pooled(x)
    for other in ((12, 20), (6, 10), (3, 5)):
        pool.to(other)
    expected = F.adaptive_avg_pool2d(x, size)
    torch.testing.assert_close(pool.to(size), expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((pool.to(size) * weights).sum(), x)
    (reference,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layout, size",
    [
        (torch.contiguous_format, (4, 4)),
        (torch.channels_last, (12, 2)),
        ("cropped", (1, 1)),
        (torch.channels_last, (5, 4)),
        ("cropped", (5, 7)),
    ],
)
def test_pooling_and_its_gradient_are_those_of_adaptive_pooling(layout, size):
    """In every layout, whether both sides divide, one or none."""
    x = torch.randn(2, 5, 12, 12, dtype=torch.float64)
    x = x[:, :3] if layout == "cropped" else x.contiguous(memory_format=layout)
    x.requires_grad_()
    found, expected = pool_to(x, size), F.adaptive_avg_pool2d(x, size)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_a_map_is_read_once_for_all_sizes(monkeypatch):
    read = []
    monkeypatch.setattr(
        alignment, "pool_to", lambda x, size: read.append(tuple(x.shape[-2:])) or pool_to(x, size)
    )
    pool = Pooled(torch.zeros(1, 1, 16, 16))
    for side in (8, 4, 2, 4, 16):
        pool.to((side, side))
    assert read == [(16, 16), (8, 8), (4, 4)]


@pytest.mark.parametrize("size", [(4, 6), (3, 5)])  # the second does not divide
def test_half_precision_is_averaged_in_float32(size):
    half = torch.randn(3, 5, 8, 12).bfloat16().requires_grad_()
    exact = half.detach().float().requires_grad_()
    found, expected = pool_to(half, size), pool_to(exact, size)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(half.grad, exact.grad.bfloat16())
