"""PKD: values by loops, Pearson's r, and what padding does."""

import numpy as np
import pytest
from losses import harness
from losses.harness import convolved, maps, numbers, on_image, pair

from sharedkd.losses.pkd import PKD


def z(x):
    """Rows (C, P) with zero mean and unit variance."""
    std = x.std(1, ddof=1, keepdims=True) if x.shape[1] > 1 else 0.0
    return (x - x.mean(1, keepdims=True)) / (std + 1e-6)


def by_hand(loss, student, teacher, boxes, sizes):
    found = {}
    for stride, maps_ in student["fpn"].items():
        adapter = numbers(loss.adapters[str(stride)])
        ours, theirs = (
            [on_image(x, size, stride).reshape(len(x), -1) for x, size in zip(m, sizes)]
            for m in ([convolved(adapter, "", x) for x in maps_], teacher["fpn"][stride])
        )
        if loss.statistics == "batch":
            ours, theirs = [np.concatenate(ours, 1)], [np.concatenate(theirs, 1)]
        squares = [(z(a) - z(b)) ** 2 for a, b in zip(ours, theirs)]
        found[f"s{stride}"] = sum(x.sum() for x in squares) / sum(x.size for x in squares) / 2
    return found


ONE_POSITION_AMONG_OTHERS = dict(strides=(32,), sizes=[(64, 96), (20, 20)])
CASES = {
    "constant student": ({}, dict(fills=(-2.0, None))),
    "constant teacher": ({}, dict(fills=(None, -2.0))),
    "one position among others": (dict(ignore_padding=True), ONE_POSITION_AMONG_OTHERS),
}


@pytest.mark.parametrize("statistics", ["batch", "image"])
@harness.every_case(PKD, CASES)
def test_value(statistics, options, given):
    harness.check_value(PKD(statistics=statistics, **options), by_hand, **given)


def test_a_single_position_has_nothing_to_correlate():
    pyramids = [{"fpn": maps((64,), images=1, padded=(64, 64), seed=k)} for k in (0, 1)]
    for statistics in ("batch", "image"):
        loss = harness.bound(PKD(statistics=statistics), *pyramids)
        gradients = harness.check_who_learns(loss, *pyramids, padded=(64, 64))
        assert not gradients["fpn", 64].any()
        assert loss(harness.batch(*pyramids, padded=(64, 64)))["s64"].item() == 0


def test_an_image_of_one_position_does_not_learn():
    student, teacher = pair((32,))
    sizes = [(64, 96), (20, 20)]
    loss = harness.bound(PKD(statistics="image", ignore_padding=True), student, teacher)
    assert not harness.check_who_learns(loss, student, teacher, sizes=sizes)["fpn", 32][1].any()


def test_pearsons_r():
    student, teacher = maps((8,), 3), maps((8,), 3, seed=1)
    student[8] = student[8] + teacher[8]
    flat = [m[8].transpose(0, 1).flatten(1).numpy() for m in (student, teacher)]
    m = flat[0].shape[1]
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(*flat)]
    loss = harness.bound(PKD(), {"fpn": student}, {"fpn": teacher})
    term = loss(harness.batch({"fpn": student}, {"fpn": teacher}))["s8"]
    assert term.item() == pytest.approx((m - 1) / m * (1 - np.mean(r)), rel=1e-5)
