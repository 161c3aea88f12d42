"""CWD: values by loops, and what padding does."""

from math import exp, log

import pytest
import torch
from losses.harness import batch, bound, maps, pair, same

from sharedkd.losses.cwd import CWD

SIZES = [(64, 96), (40, 33)]  # of two images on a canvas of 64 x 96 pixels


def phi(values, tau):
    """The distribution of one channel's list of values."""
    largest = max(values)
    powers = [exp((v - largest) / tau) for v in values]
    return [p / sum(powers) for p in powers]


def reference(s, t, stride, tau, sizes=None):
    result = 0.0
    n, channels, height, width = t.shape
    for i in range(n):
        where = [
            (y, x)
            for y in range(height)
            for x in range(width)
            if not sizes or (y * stride < sizes[i][0] and x * stride < sizes[i][1])
        ]
        for c in range(channels):
            q, p = (phi([m[i, c, y, x].item() for y, x in where], tau) for m in (s, t))
            result += sum(b * (log(b) - log(a)) for a, b in zip(q, p))
    return tau * tau * result / (channels * n)


@pytest.mark.parametrize(
    "strides, tau, ignore",
    [((8, 32), 1.0, False), ((8, 32), 4.0, True), ((128,), 1.0, False)],
    ids=["random", "flatter, without padding", "one pixel"],
)
def test_value(strides, tau, ignore):
    student, teacher = pair(strides)
    loss = bound(CWD(temperature=tau, ignore_padding=ignore), student, teacher)
    sizes = SIZES if ignore else None
    expected = {
        f"s{k}": reference(s, teacher["fpn"][k], k, tau, sizes) for k, s in student["fpn"].items()
    }
    same(loss(batch(student, teacher, sizes=SIZES)), expected)


def test_large_values_do_not_overflow():
    student, teacher = ({"fpn": {16: 1e30 * maps((16,), seed=k)[16]}} for k in (0, 1))
    for ignore in (False, True):
        for dtype in (torch.float32, torch.float64):
            given = [{"fpn": {16: p["fpn"][16].to(dtype)}} for p in (student, teacher)]
            loss = bound(CWD(1.0, ignore_padding=ignore), *given)
            assert loss(batch(*given, sizes=SIZES))["s16"].isfinite()
