"""CWD: values by loops, and what padding does."""

import numpy as np
import pytest
import torch
from losses.harness import batch, bound, maps, on_image, pair, same, softmax

from sharedkd.losses.cwd import CWD

SIZES = [(64, 96), (40, 33)]  # of two images on a canvas of 64 x 96 pixels


def reference(s, t, stride, tau, sizes):
    result = 0.0
    for *maps_, size in zip(s.numpy(), t.numpy(), sizes):
        q, p = (softmax(on_image(x, size, stride).reshape(len(x), -1) / tau) for x in maps_)
        result += (p * np.log(p / q)).sum()
    return tau * tau * result / (t.shape[0] * t.shape[1])


@pytest.mark.parametrize(
    "strides, tau, ignore",
    [((8, 32), 1.0, False), ((8, 32), 4.0, True), ((128,), 1.0, False)],
    ids=["random", "flatter, without padding", "one pixel"],
)
def test_value(strides, tau, ignore):
    student, teacher = pair(strides)
    loss = bound(CWD(temperature=tau, ignore_padding=ignore), student, teacher)
    sizes = SIZES if ignore else [(64, 96)] * 2
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
