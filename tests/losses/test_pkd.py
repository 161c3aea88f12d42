"""PKD: values by loops, Pearson's r, and what padding does."""

import numpy as np
import pytest
from losses.harness import batch, bound, check_who_learns, maps, on_image, pair, same

from sharedkd.losses.pkd import PKD

SIZES = [(64, 96), (40, 33)]  # of two images on a canvas of 64 x 96 pixels


def z(x):
    """Rows (C, P) with zero mean and unit variance."""
    std = x.std(1, ddof=1, keepdims=True) if x.shape[1] > 1 else 0.0
    return (x - x.mean(1, keepdims=True)) / (std + 1e-6)


def reference(s, t, stride, statistics="batch", sizes=None):
    ours, theirs = (
        [
            on_image(x, size, stride).reshape(len(x), -1)
            for x, size in zip(m.numpy(), sizes or [(64, 96)] * len(m))
        ]
        for m in (s, t)
    )
    if statistics == "batch":
        ours, theirs = [np.concatenate(ours, 1)], [np.concatenate(theirs, 1)]
    squares = [(z(a) - z(b)) ** 2 for a, b in zip(ours, theirs)]
    return sum(x.sum() for x in squares) / sum(x.size for x in squares) / 2


def expected(student, teacher, *options):
    return {
        f"s{k}": reference(s, teacher["fpn"][k], k, *options) for k, s in student["fpn"].items()
    }


@pytest.mark.parametrize("strides", [(8, 32), (128,)], ids=["random", "a pixel per image"])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("statistics", ["batch", "image"])
def test_value(strides, ignore, statistics):
    """Padding counts unless it is ignored."""
    student, teacher = pair(strides)
    loss = bound(PKD(statistics=statistics, ignore_padding=ignore), student, teacher)
    found = loss(batch(student, teacher, sizes=SIZES))
    same(found, expected(student, teacher, statistics, SIZES if ignore else None))


def test_a_constant_map_stays_constant():
    random, teacher = pair((16,))
    flat, _ = pair((16,), fill=-2.0)
    for maps_ in ((flat, teacher), (random, flat)):
        same(bound(PKD(), *maps_)(batch(*maps_)), expected(*maps_))


def test_a_single_position_has_nothing_to_correlate():
    pyramids = [{"fpn": maps((64,), images=1, padded=(64, 64), seed=k)} for k in (0, 1)]
    for statistics in ("batch", "image"):
        loss = bound(PKD(statistics=statistics), *pyramids)
        gradients = check_who_learns(loss, *pyramids, padded=(64, 64))
        assert not gradients["fpn", 64].any()
        assert loss(batch(*pyramids, padded=(64, 64)))["s64"].item() == 0


def test_an_image_of_one_position_between_others():
    student, teacher = pair((32,))
    sizes = [(64, 96), (20, 20)]
    loss = bound(PKD(statistics="image", ignore_padding=True), student, teacher)
    found = loss(batch(student, teacher, sizes=sizes))
    same(found, expected(student, teacher, "image", sizes))
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
