"""Shared-KD's own losses: values by loops, who learns from whom, padding, levels."""

import numpy as np
import pytest
import torch
from losses.harness import (
    ONE_STAGE,
    TWO_STAGE,
    Written,
    averaged,
    batch,
    bound,
    check_gradients,
    distance_by_hand,
    leaves,
    maps,
    total,
)

from sharedkd.losses import Batch, CrossLayer, IdenticalLayer
from sharedkd.losses.identical_layer import shared_targets

DIRECTIONS = ("mutual", "deep_to_shallow", "shallow_to_deep")
DISTANCES = ("mse", "l1", "smooth_l1", "cosine")
NORMALIZATIONS = ("none", "channel", "instance", "position")

CANVAS = (40, 72)  # pixels: 5x9, 3x5, 2x3, 1x2 cells of strides 8 to 64; pooled cells overlap
SIZES = [(40, 41), (17, 72)]


def pair(
    strides=(8, 16, 32),
    teachers=None,
    ours=3,
    theirs=3,
    padded=CANVAS,
    images=2,
    fills=(None, None),
    flat=(),
    tap="fpn",
    dtype=torch.float64,
):
    """Maps of student and teacher; the student's are 1.5 everywhere on the ``flat`` levels."""
    more = dict(padded=padded, images=images, dtype=dtype)
    student = maps(strides, ours, seed=1, fill=fills[0], **more)
    student.update({s: torch.full_like(student[s], 1.5) for s in flat})
    teacher = maps(teachers or strides, theirs, seed=2, fill=fills[1], **more)
    return {tap: student}, {tap: teacher}


# --- reference: loops over arrays (N, C, H, W) ---------------------------------------------------


def numbers(levels):
    return {s: x.detach().double().numpy() for s, x in levels.items()}


def aligned(a, b):
    channels, height, width = map(min, a.shape[1:], b.shape[1:])
    return (averaged(x[:, :channels], height, width) for x in (a, b))


def target_by_hand(teacher, stride, share):
    """Every channel's mean over the level and those lower levels that have this channel."""
    lower = [k for k in sorted(teacher) if k < stride]
    lower = {"dense": lower, "adjacent": lower[-1:], "none": []}[share]
    result = teacher[stride].copy()
    for n, c in np.ndindex(*result.shape[:2]):
        size = result.shape[2:]
        planes = [averaged(teacher[k][n, c], *size) for k in lower if c < teacher[k].shape[1]]
        result[n, c] = sum([result[n, c], *planes]) / (1 + len(planes))
    return result


def distance(a, b, stride, sizes, **kind):
    """Mean over the positions whose first pixel lies on its image; ``sizes``: None counts all."""
    a, b = (torch.tensor(x) for x in (a, b))
    mask = torch.ones_like(a[:, :1])
    for n, (height, width) in enumerate(sizes or ()):
        mask[n, :, -(-height // stride) :] = 0
        mask[n, :, :, -(-width // stride) :] = 0
    return distance_by_hand(a, b, mask, **kind)


def identical_by_hand(student, teacher, sizes, share="dense", **kind):
    terms = {}
    for stride in sorted(set(student) & set(teacher)):
        s, t = aligned(student[stride], target_by_hand(teacher, stride, share))
        terms[f"s{stride}"] = distance(s, t, stride, sizes, **kind)
    return terms


def cross_by_hand(learner, target, sizes, pairs="dense", direction="mutual", **kind):
    """``learner`` and ``target`` are the same maps; apart, only the first are differentiated."""
    strides, terms = sorted(learner), {}
    for i, shallow in enumerate(strides):
        for deep in strides[i + 1 :] if pairs == "dense" else strides[i + 1 : i + 2]:
            value = 0.0
            if direction in ("mutual", "deep_to_shallow"):
                s, d = aligned(learner[shallow], target[deep])
                value += distance(s, d, deep, sizes, **kind)
            if direction in ("mutual", "shallow_to_deep"):
                s, d = aligned(target[shallow], learner[deep])
                value += distance(s, d, deep, sizes, **kind)
            terms[f"s{shallow}_s{deep}"] = value
    return terms


# --- values --------------------------------------------------------------------------------------

#: Cases where something is constant: a rounding error is divided by the root of a tiny variance.
FLAT = {
    "zeros": dict(fills=(0.0, 0.0)),
    "zeros of the teacher": dict(fills=(None, 0.0)),
    "constants": dict(fills=(-2.5, 1.5)),
    "a constant level": dict(flat=[16]),
    "one pixel": dict(strides=(16, 32), padded=(16, 16), images=1),
    "an image of one pixel among others": dict(sizes=[CANVAS, (7, 8)]),
}
CASES = {
    "odd size": {},
    "whole cells": dict(padded=(64, 32)),
    "wider upwards": dict(ours={8: 2, 16: 3, 32: 5}, theirs={8: 2, 16: 4, 32: 6}),
    "narrower upwards": dict(ours={8: 5, 16: 3, 32: 2}, theirs={8: 4, 16: 2, 32: 3}),
    "levels that the other lacks": dict(strides=(8, 16, 64), teachers=(4, 16, 32, 64)),
    "padding around all": dict(padded=(64, 80), sizes=[(33, 72), (50, 9)]),
    "padding, unequal widths": dict(
        ours={8: 2, 16: 3, 32: 5}, theirs={8: 3, 16: 2, 32: 4}, sizes=SIZES
    ),
    **FLAT,
}


def given(case):
    """Student, teacher, the sizes of the images, and the values of ignore_padding worth trying."""
    case = dict(CASES[case])
    ignores = (True, False) if "sizes" in case else (True,)
    sizes = case.pop("sizes", [case.get("padded", CANVAS)] * case.get("images", 2))
    return (*pair(**case), sizes, ignores)


def check_terms(terms, expected, case, what):
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert terms[name].shape == () and terms[name].dtype == torch.float64
        close = pytest.approx(value, rel=1e-9, abs=1e-6 if case in FLAT else 0)
        assert terms[name].item() == close, (name, what)


def check_identical(case, **options):
    student, teacher, sizes, ignores = given(case)
    s, t = numbers(student["fpn"]), numbers(teacher["fpn"])
    for ignore in ignores:
        loss = bound(IdenticalLayer(ignore_padding=ignore, **options), student, teacher)
        terms = loss(batch(student, teacher, sizes=sizes))
        expected = identical_by_hand(s, t, sizes if ignore else None, **options)
        check_terms(terms, expected, case, (options, ignore))


def check_cross(case, **options):
    student, _, sizes, ignores = given(case)
    x = numbers(student["fpn"])
    for ignore in ignores:
        loss = bound(CrossLayer(ignore_padding=ignore, **options), student)
        expected = cross_by_hand(x, x, sizes if ignore else None, **options)
        check_terms(loss(batch(student, sizes=sizes)), expected, case, (options, ignore))


@pytest.mark.parametrize("case", CASES)
def test_value(case):
    """As published: raw squared errors of dense targets, and of all pairs both ways."""
    check_identical(case)
    check_cross(case)


@pytest.mark.parametrize("distance, normalize", zip(DISTANCES, NORMALIZATIONS))
def test_value_of_every_distance(distance, normalize):
    """test_distance.py has every distance with every normalisation."""
    kind = dict(distance=distance, normalize=normalize)
    for case in ("padding, unequal widths", "constants"):
        check_identical(case, **kind)
        check_cross(case, **kind)


@pytest.mark.parametrize("share", ("adjacent", "none"))
def test_value_of_every_share(share):
    check_identical("padding, unequal widths", share=share)
    check_identical("levels that the other lacks", share=share)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_value_of_every_direction(direction):
    check_cross("padding, unequal widths", direction=direction, pairs="adjacent")


@pytest.mark.parametrize("kind", [IdenticalLayer, CrossLayer])
def test_backbone_stages(kind):
    """Stages are found by their stride; their widths grow, so that every pair is cropped."""
    strides, widths = (4, 8, 16), {4: 2, 8: 4, 16: 8}
    student, teacher = pair(strides, ours=widths, theirs={s: 3 * w for s, w in widths.items()})
    others = maps(strides, seed=7, padded=CANVAS)
    ours, theirs = ({"backbone": x["fpn"], "fpn": others} for x in (student, teacher))
    terms = bound(kind(tap="backbone"), ours, theirs)(batch(ours, theirs, padded=CANVAS))
    s, t = numbers(student["fpn"]), numbers(teacher["fpn"])
    expected = (
        identical_by_hand(s, t, None) if kind is IdenticalLayer else cross_by_hand(s, s, None)
    )
    check_terms(terms, expected, None, kind)


# --- teacher share: numbers small enough to check by eye -----------------------------------------


def test_channels_that_a_lower_level_lacks_are_averaged_over_those_that_have_them():
    teacher = {
        4: torch.full((1, 1, 4, 4), 12.0),
        8: torch.full((1, 2, 2, 2), 6.0),
        16: torch.full((1, 4, 1, 1), 3.0),
    }
    target = shared_targets(teacher, [16], "dense")[16].flatten().tolist()
    assert target == pytest.approx([(12 + 6 + 3) / 3, (6 + 3) / 2, 3, 3])
    target = shared_targets(teacher, [16], "adjacent")[16].flatten().tolist()
    assert target == pytest.approx([4.5, 4.5, 3, 3])


@pytest.mark.parametrize("channels, pooled", [(4, 1), ({8: 2, 16: 4}, 0)])
def test_a_target_of_16_bits_is_written_once(channels, pooled):
    teacher = maps((8, 16), channels, images=3, dtype=torch.bfloat16)
    with Written() as written:
        target = shared_targets(teacher, [16])[16]
    assert target.dtype == torch.float32
    # ... beside the finer map pooled to its size, if that is as wide
    assert [numbers for numbers, _ in written.sizes].count(target.numel()) == 1 + pooled


# --- gradients -----------------------------------------------------------------------------------


def test_identical_layer_gradients():
    """Two levels whose cells overlap; an image of one position on the deeper."""
    student, teacher = pair((32, 64), ours={32: 3, 64: 4})
    more = dict(padded=CANVAS, sizes=[(40, 72), (33, 40)])
    for distance, normalize in zip(DISTANCES, NORMALIZATIONS):
        loss = bound(IdenticalLayer(distance=distance, normalize=normalize), student, teacher)
        check_gradients(loss, student, teacher, **more)


def gradients(loss, student, **more):
    """Stride -> gradient of the sum of a loss's terms."""
    student = leaves(student)
    total(loss(batch(student, **more))).backward()
    return {stride: x.grad for stride, x in student["fpn"].items()}


def untouched(gradient):
    return gradient is None or not gradient.any()


@pytest.mark.parametrize(
    "direction, pairs, distance, normalize",
    [
        ("mutual", "dense", "mse", "none"),
        ("mutual", "adjacent", "cosine", "position"),
        ("deep_to_shallow", "dense", "l1", "channel"),
        ("deep_to_shallow", "adjacent", "mse", "instance"),
        ("shallow_to_deep", "dense", "smooth_l1", "instance"),
        ("shallow_to_deep", "adjacent", "mse", "channel"),
    ],
)
def test_cross_layer_gradient_is_that_of_the_loops_with_fixed_targets(
    distance, normalize, direction, pairs
):
    """Three levels: the middle one learns in one pair and is a target in another."""
    sizes = [(40, 72), (33, 50)]
    student, _ = pair((16, 32, 64), ours={16: 2, 32: 3, 64: 2})
    options = dict(pairs=pairs, direction=direction, distance=distance, normalize=normalize)
    found = gradients(bound(CrossLayer(**options), student), student, sizes=sizes)
    target = numbers(student["fpn"])
    learner = {s: x.copy() for s, x in target.items()}
    step = 1e-5
    for stride, x in student["fpn"].items():
        slopes = torch.zeros_like(x)
        for n, c, row, column in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
            value = learner[stride][n, c, row, column].copy()
            for sign in (1, -1):
                learner[stride][n, c, row, column] = value + sign * step
                slopes[n, c, row, column] += sign * sum(
                    cross_by_hand(learner, target, sizes, **options).values()
                )
            learner[stride][n, c, row, column] = value
        slopes /= 2 * step
        if untouched(found[stride]):
            # Only the end of the pyramid that has nobody to learn from.
            assert stride == {"deep_to_shallow": 64, "shallow_to_deep": 16}.get(direction)
            assert not slopes.any()
        else:
            assert torch.allclose(found[stride], slopes, rtol=1e-5, atol=1e-8)


# --- images and padding --------------------------------------------------------------------------


SIZE = 128  # pixels: whole cells on every level up to stride 128


@pytest.mark.parametrize("stride, rows, columns", [(8, 5, 2), (16, 3, 1), (32, 2, 1), (64, 1, 1)])
def test_which_positions_lie_inside(stride, rows, columns):
    found = Batch({}, None, [(SIZE, SIZE), (40, 9)])
    inside = found.inside(torch.zeros(2, 3, SIZE // stride, SIZE // stride), stride)
    assert inside.shape == (2, 1, SIZE // stride, SIZE // stride)
    assert inside[0].all()
    expected = torch.zeros(SIZE // stride, SIZE // stride, dtype=torch.bool)
    expected[:rows, :columns] = True
    assert torch.equal(inside[1, 0], expected)


def test_without_padding_there_is_no_mask():
    assert Batch({}, None, [(SIZE, SIZE)] * 2).inside(torch.zeros(2, 1, 4, 4), 32) is None


# --- which levels --------------------------------------------------------------------------------


def test_strides_option():
    student, teacher = pair(TWO_STAGE, teachers=ONE_STAGE)
    assert bound(IdenticalLayer(strides=[32, 8]), student, teacher).strides == [8, 32]
    some = bound(CrossLayer(strides=[64, 4, 16], pairs="adjacent"), student)
    assert some.level_pairs() == [(4, 16), (16, 64)]
    some = bound(CrossLayer(strides=[64, 4, 16]), student)
    assert some.level_pairs() == [(4, 16), (4, 64), (16, 64)]
    assert list(some(batch(student, padded=CANVAS))) == ["s4_s16", "s4_s64", "s16_s64"]
    assert bound(CrossLayer(), student, teacher).strides == list(TWO_STAGE)  # reads no teacher
