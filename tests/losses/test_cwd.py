"""CWD: values by loops, and what padding does."""

from math import exp, log

import pytest
import torch
from losses.harness import batch, bound, maps

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


RANDOM = dict(strides=(8, 32))
CASES = {
    "random": (RANDOM, RANDOM, 1.0),
    "flatter": (RANDOM, RANDOM, 4.0),
    "one image": (dict(strides=(16,), images=1), dict(strides=(16,), images=1), 1.0),
    "one pixel": (dict(strides=(128,)), dict(strides=(128,)), 1.0),
    "a constant student": (dict(strides=(16,), fill=-3.0), dict(strides=(16,)), 1.0),
    "a constant teacher": (dict(strides=(16,)), dict(strides=(16,), fill=0.0), 1.0),
}


@pytest.mark.parametrize("ours, theirs, tau", CASES.values(), ids=CASES)
def test_value(ours, theirs, tau):
    student, teacher = {"fpn": maps(**ours)}, {"fpn": maps(seed=1, **theirs)}
    terms = bound(CWD(temperature=tau), student, teacher)(batch(student, teacher))
    assert list(terms) == [f"s{stride}" for stride in ours["strides"]]
    for stride, s in student["fpn"].items():
        expected = reference(s, teacher["fpn"][stride], stride, tau)
        assert terms[f"s{stride}"].item() == pytest.approx(expected, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("ignore", [False, True])
def test_padding_counts_unless_ignored(ignore):
    student, teacher = {"fpn": maps((8, 16))}, {"fpn": maps((8, 16), seed=1)}
    loss = bound(CWD(temperature=2.0, ignore_padding=ignore), student, teacher)
    terms = loss(batch(student, teacher, sizes=SIZES))
    for stride in (8, 16):
        expected = reference(
            student["fpn"][stride], teacher["fpn"][stride], stride, 2.0, SIZES if ignore else None
        )
        assert terms[f"s{stride}"].item() == pytest.approx(expected, rel=1e-9)


def test_large_values_do_not_overflow():
    student, teacher = ({"fpn": {16: 1e30 * maps((16,), seed=k)[16]}} for k in (0, 1))
    for ignore in (False, True):
        for dtype in (torch.float32, torch.float64):
            given = [{"fpn": {16: p["fpn"][16].to(dtype)}} for p in (student, teacher)]
            loss = bound(CWD(1.0, ignore_padding=ignore), *given)
            assert loss(batch(*given, sizes=SIZES))["s16"].isfinite()
