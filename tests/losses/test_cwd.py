"""CWD: values by loops, and what padding does."""

import numpy as np
import pytest
import torch
from losses import harness
from losses.harness import convolved, maps, numbers, on_image, softmax

from sharedkd.losses.cwd import CWD


def by_hand(loss, student, teacher, boxes, sizes):
    found = {}
    for stride, maps_ in student["fpn"].items():
        result, t, tau = 0.0, teacher["fpn"][stride], loss.temperature
        adapter = numbers(loss.adapters[str(stride)])
        for s, t_, size in zip(maps_, t, sizes):
            q, p = (
                softmax(on_image(x, size, stride).reshape(len(x), -1) / tau)
                for x in (convolved(adapter, "", s), t_)
            )
            result += (p * np.log(p / q)).sum()
        found[f"s{stride}"] = tau * tau * result / (t.shape[0] * t.shape[1])
    return found


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@harness.every_case(CWD)
def test_value(temperature, options, given):
    harness.check_value(CWD(temperature, **options), by_hand, **given)


def test_large_values_do_not_overflow():
    student, teacher = ({"fpn": {16: 1e30 * maps((16,), seed=k)[16]}} for k in (0, 1))
    for ignore in (False, True):
        for dtype in (torch.float32, torch.float64):
            given = [{"fpn": {16: p["fpn"][16].to(dtype)}} for p in (student, teacher)]
            loss = harness.bound(CWD(1.0, ignore_padding=ignore), *given)
            assert loss(harness.batch(*given, sizes=[(64, 96), (40, 33)]))["s16"].isfinite()
