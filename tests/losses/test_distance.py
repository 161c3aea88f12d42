"""Every distance with every normalisation against the formula in numpy and float64."""

import pytest
import torch
from losses.harness import Written, distance_by_hand

from sharedkd.errors import ConfigError
from sharedkd.losses.distance import Distance, _channels, _positions

KINDS = ("mse", "l1", "smooth_l1", "cosine")
NORMALIZATIONS = ("none", "channel", "instance", "position")
SHAPE = (2, 3, 4, 5)


def reference(x, y, kind, normalize, mask):
    return distance_by_hand(x, y, mask, kind, normalize)


def maps(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(SHAPE, generator=generator) + 1
    y = 0.5 * torch.randn(SHAPE, generator=generator) - 3
    return x, y


def padding_mask():
    """The first image fills the map, the second only its top left 3x2."""
    mask = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    mask[1, :, 3:] = False
    mask[1, :, :, 2:] = False
    return mask


MASKS = {"no mask": None, "mask": padding_mask()}


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient(kind, normalize):
    for mask in MASKS.values():
        x, y = maps()
        x.requires_grad_()
        loss = Distance(kind, normalize)(x, y, mask)
        loss.backward()
        assert loss.shape == () and loss.dtype == torch.float32
        assert loss.item() == pytest.approx(reference(x, y, kind, normalize, mask), rel=2e-5)
        step = 1e-5
        for index in [(0, 0, 0, 0), (0, 2, 3, 4), (1, 1, 2, 1), (1, 0, 3, 4)]:  # the last: padding
            up, down = x.detach().double(), x.detach().double()
            up[index] += step
            down[index] -= step
            ends = [reference(z, y, kind, normalize, mask) for z in (up, down)]
            slope = (ends[0] - ends[1]) / (2 * step)
            assert x.grad[index].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind, normalize", zip(KINDS, NORMALIZATIONS))
def test_half_precision_is_computed_in_float32(kind, normalize):
    """bfloat16 has 8 bits: a result of that type would be off by up to 0.4 %."""
    x, y = (t.bfloat16() for t in maps())
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = Distance(kind, normalize)(x, y)
        assert result.dtype == torch.float32
        assert result.item() == pytest.approx(reference(x, y, kind, normalize, None), rel=2e-5)


@pytest.mark.parametrize("value, other", [(0.0, 0.0), (5.0, -2.0), (1e3, -1e3)])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_constant_maps_are_finite(normalize, value, other):
    for kind in KINDS:
        for mask in MASKS.values():
            for y in (torch.full(SHAPE, other), maps()[1]):
                x = torch.full(SHAPE, value, requires_grad=True)
                loss = Distance(kind, normalize)(x, y, mask)
                loss.backward()
                assert loss.isfinite() and x.grad.isfinite().all()


@pytest.mark.parametrize(
    "normalize, mask, positions, layout",
    [
        ("channel", "mask", 3, torch.contiguous_format),
        ("channel", "no mask", 3, torch.channels_last),
        ("channel", "mask", 100, "transposed"),
        ("instance", "no mask", 3, "transposed"),
        ("instance", "mask", 3, torch.channels_last),
        ("instance", "no mask", 100, torch.contiguous_format),
    ],
)
def test_large_maps_are_read_in_blocks(monkeypatch, normalize, mask, positions, layout):
    """Blocks of which the last is smaller, or which hold all: the same numbers in every layout."""
    x, y = (each.double() for each in maps(2))
    mask = MASKS[mask]
    if layout == "transposed":  # height and width cannot be flattened without a copy
        x, y = (each.transpose(2, 3).contiguous().transpose(2, 3) for each in (x, y))
    else:
        x, y = (each.contiguous(memory_format=layout) for each in (x, y))
    n, c, h, w = x.shape
    block = positions * n * c
    read_in_blocks_of(block, monkeypatch)
    found = blocks(x.flatten(2))
    assert sum(found) == x.numel() and max(found) <= block
    assert len(found) >= -(-h * w // positions)
    if layout is torch.channels_last:  # all channels of some positions
        assert len(found) == -(-h * w // positions)

    def distance(x, y):
        return Distance("mse", normalize)(x, y, mask)

    expected = reference(x, y, "mse", normalize, mask)
    assert distance(x, y).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(distance, (x.requires_grad_(), y.requires_grad_()))
    (gradient,) = torch.autograd.grad(distance(x, y), x)
    assert layout == "transposed" or gradient.stride() == x.stride()


def read_in_blocks_of(numbers, monkeypatch):
    monkeypatch.setattr("sharedkd.losses.distance.CPU_BLOCK", numbers)


def blocks(x):
    """How many numbers of a map (N, C, P) are read at a time."""
    return [part.numel() for some in _channels(x) for (part,) in _positions(*some)]


def test_of_equal_large_maps_rounding_is_left():
    x = torch.randn(1, 8, 200, 334, generator=torch.Generator().manual_seed(0)) * 3 + 7
    x.requires_grad_()
    loss = Distance("mse", "channel")(x, x.detach().clone())
    assert 0 <= loss.item() < 1e-5
    loss.backward()
    other = Distance("mse", "channel")(x, x.detach().flip(0, 2, 3))
    (usual,) = torch.autograd.grad(other, x)
    assert x.grad.abs().max() < 1e-4 * usual.abs().max()


def test_raw_distance_sees_the_scale():
    x, y = torch.zeros(1, 2, 1, 1), torch.tensor([3.0, 0.5]).view(1, 2, 1, 1)
    assert Distance("mse")(x, y).item() == pytest.approx((9 + 0.25) / 2)
    assert Distance("l1")(x, y).item() == pytest.approx((3 + 0.5) / 2)
    assert Distance("smooth_l1")(x, y).item() == pytest.approx((2.5 + 0.125) / 2)


def test_standardised_mse_is_twice_one_minus_the_correlation():
    x, y = maps()
    pearson = [
        torch.corrcoef(torch.stack([x[:, c].flatten(), y[:, c].flatten()]).double())[0, 1].item()
        for c in range(3)
    ]
    expected = sum(2 * (1 - r) for r in pearson) / 3
    assert Distance("mse", "channel")(x, y).item() == pytest.approx(expected, rel=1e-4)


def test_mask_without_a_single_position_is_zero():
    x, y = maps()
    x.requires_grad_()
    loss = Distance("mse", "channel")(x, y, torch.zeros(2, 1, 4, 5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()


@pytest.mark.parametrize("normalize", ["channel", "instance"])
@pytest.mark.parametrize("size", [(1, 1), (7, 9)])
def test_gradients_of_constant_maps_are_not_rounding(normalize, size):
    """1 / EPS must not enlarge what float32 leaves of equal numbers after their mean is taken off."""
    torch.manual_seed(0)
    constant = (torch.rand(1, 16, 1, 1) * 100).round().expand(2, 16, *size)
    other = torch.randn(2, 16, *size)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x = constant.to(dtype).clone().requires_grad_()
        Distance("mse", normalize)(x, other.to(dtype)).backward()
        gradients.append(x.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "normalize, mask, student, teacher, layout",
    [
        ("channel", None, torch.float32, torch.bfloat16, torch.channels_last),
        ("channel", True, torch.bfloat16, torch.float32, torch.contiguous_format),
        ("instance", None, torch.bfloat16, torch.bfloat16, torch.contiguous_format),
        ("instance", True, torch.float32, torch.float32, torch.channels_last),
    ],
)
def test_nothing_of_full_size_is_written_but_the_gradient(
    monkeypatch, normalize, mask, student, teacher, layout
):
    read_in_blocks_of(2**10, monkeypatch)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 8, 30, 30, generator=draw).unbind()
    x = x.to(student).contiguous(memory_format=layout).requires_grad_()
    y = y.to(teacher).contiguous(memory_format=layout)
    if mask is not None:
        mask = (torch.arange(30) < 23).view(1, 1, 30, 1).expand(2, 1, 30, 30)
    with Written() as written:
        Distance("mse", normalize)(x, y, mask).backward()
    assert x.grad.dtype == student
    full = [dtype for numbers, dtype in written.sizes if numbers >= x.numel() // 2]
    assert full == [student]
    exact = x.detach().float().requires_grad_()
    Distance("mse", normalize)(exact, y.float(), mask).backward()
    rounding = 1e-5 if student == torch.float32 else 1e-2  # sums have another order
    assert (x.grad.float() - exact.grad).abs().max() <= rounding * exact.grad.abs().max()


def test_unknown_names():
    with pytest.raises(ConfigError, match=f"^distance=l3:.*{', '.join(KINDS)}"):
        Distance("l3")
    with pytest.raises(ConfigError, match=f"^normalize=layer:.*{', '.join(NORMALIZATIONS)}"):
        Distance(normalize="layer")
