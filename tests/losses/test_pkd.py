"""PKD: values by loops, Pearson's r, and what padding does."""

from math import sqrt

import numpy as np
import pytest
from losses.harness import batch, bound, check_who_learns, maps

from sharedkd.losses.pkd import PKD

SIZES = [(64, 96), (40, 33)]  # of two images on a canvas of 64 x 96 pixels


def z(values):
    mean = sum(values) / len(values)
    squares = sum((v - mean) ** 2 for v in values)
    std = sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0
    return [(v - mean) / (std + 1e-6) for v in values]


def reference(s, t, stride, statistics="batch", sizes=None):
    n, channels, height, width = t.shape
    groups = [range(n)] if statistics == "batch" else [[i] for i in range(n)]
    total, count = 0.0, 0
    for group in groups:
        where = [
            (i, y, x)
            for i in group
            for y in range(height)
            for x in range(width)
            if not sizes or (y * stride < sizes[i][0] and x * stride < sizes[i][1])
        ]
        for c in range(channels):
            a, b = (z([m[i, c, y, x].item() for i, y, x in where]) for m in (s, t))
            total += sum((u - v) ** 2 for u, v in zip(a, b))
            count += len(where)
    return total / count / 2


RANDOM = dict(strides=(8, 32))
CASES = {
    "random": (RANDOM, RANDOM),
    "one image": (dict(strides=(16,), images=1), dict(strides=(16,), images=1)),
    "a pixel per image": (dict(strides=(128,)), dict(strides=(128,))),
    "a constant student": (dict(strides=(16,), fill=-2.0), dict(strides=(16,))),
    "a constant teacher": (dict(strides=(16,)), dict(strides=(16,), fill=0.0)),
}


@pytest.mark.parametrize("ours, theirs", CASES.values(), ids=CASES)
@pytest.mark.parametrize("statistics", ["batch", "image"])
def test_value(ours, theirs, statistics):
    student, teacher = {"fpn": maps(**ours)}, {"fpn": maps(seed=1, **theirs)}
    terms = bound(PKD(statistics=statistics), student, teacher)(batch(student, teacher))
    assert list(terms) == [f"s{stride}" for stride in ours["strides"]]
    for stride, s in student["fpn"].items():
        expected = reference(s, teacher["fpn"][stride], stride, statistics)
        assert terms[f"s{stride}"].item() == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_a_single_position_has_nothing_to_correlate():
    pyramids = [{"fpn": maps((64,), images=1, padded=(64, 64), seed=k)} for k in (0, 1)]
    for statistics in ("batch", "image"):
        loss = bound(PKD(statistics=statistics), *pyramids)
        gradients = check_who_learns(loss, *pyramids, padded=(64, 64))
        assert not gradients["fpn", 64].any()
        assert loss(batch(*pyramids, padded=(64, 64)))["s64"].item() == 0


@pytest.mark.parametrize("statistics", ["batch", "image"])
@pytest.mark.parametrize("ignore", [False, True])
def test_padding_counts_unless_ignored(statistics, ignore):
    student, teacher = {"fpn": maps((8, 16))}, {"fpn": maps((8, 16), seed=1)}
    loss = bound(PKD(statistics=statistics, ignore_padding=ignore), student, teacher)
    terms = loss(batch(student, teacher, sizes=SIZES))
    for stride in (8, 16):
        s, t = student["fpn"][stride], teacher["fpn"][stride]
        expected = reference(s, t, stride, statistics, SIZES if ignore else None)
        assert terms[f"s{stride}"].item() == pytest.approx(expected, rel=1e-9)


def test_an_image_of_one_position_between_others():
    student, teacher = {"fpn": maps((32,))}, {"fpn": maps((32,), seed=1)}
    sizes = [(64, 96), (20, 20)]
    loss = bound(PKD(statistics="image", ignore_padding=True), student, teacher)
    expected = reference(student["fpn"][32], teacher["fpn"][32], 32, "image", sizes)
    assert loss(batch(student, teacher, sizes=sizes))["s32"].item() == pytest.approx(
        expected, rel=1e-9
    )
    assert not check_who_learns(loss, student, teacher, sizes=sizes)["fpn", 32][1].any()


def test_pearsons_r():
    student, teacher = maps((8,), 3), maps((8,), 3, seed=1)
    student[8] = student[8] + teacher[8]
    flat = [m[8].transpose(0, 1).flatten(1).numpy() for m in (student, teacher)]
    m = flat[0].shape[1]
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(*flat)]
    loss = bound(PKD(), {"fpn": student}, {"fpn": teacher})
    term = loss(batch({"fpn": student}, {"fpn": teacher}))["s8"]
    assert term.item() == pytest.approx((m - 1) / m * (1 - np.mean(r)), rel=1e-5)
