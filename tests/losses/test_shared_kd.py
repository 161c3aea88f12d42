"""Shared-KD's own losses: values by loops, who learns from whom, invariances, padding, levels."""

from collections import defaultdict
from math import ceil, floor, sqrt

import pytest
import torch
from losses.harness import (
    ONE_STAGE,
    TWO_STAGE,
    Written,
    batch,
    bound,
    check_gradients,
    check_who_learns,
    leaves,
    maps,
    parameters,
    total,
)

from sharedkd.errors import ConfigError
from sharedkd.losses import Batch, CrossLayer, DistillationLoss, IdenticalLayer
from sharedkd.losses.teacher_share import shared_targets

SHARES = ("dense", "adjacent", "none")
PAIRS = ("dense", "adjacent")
DIRECTIONS = ("mutual", "deep_to_shallow", "shallow_to_deep")
DISTANCES = ("mse", "l1", "smooth_l1", "cosine")
NORMALIZATIONS = ("none", "channel", "instance", "position")
LOSSES = (IdenticalLayer, CrossLayer)

CANVAS = (40, 72)  # pixels: 5x9, 3x5, 2x3, 1x2 cells of strides 8 to 64; pooled cells overlap
PADDING = dict(padded=CANVAS, sizes=[(40, 41), (17, 72)])


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


# --- reference: python loops over nested lists [image][channel][row][column] ---------------------


def numbers(levels):
    return {s: x.detach().double().tolist() for s, x in levels.items()}


def extent(x):
    """(channels, height, width)"""
    return len(x[0]), len(x[0][0]), len(x[0][0][0])


def window(i, size, cells):
    """The indices of ``size`` that cell i of ``cells`` averages: all that it overlaps."""
    return range(floor(i * size / cells), ceil((i + 1) * size / cells))


def pooled(plane, height, width):
    result = []
    for y in range(height):
        rows = window(y, len(plane), height)
        result.append([])
        for x in range(width):
            cells = [plane[r][c] for r in rows for c in window(x, len(plane[0]), width)]
            result[-1].append(sum(cells) / len(cells))
    return result


def aligned(a, b):
    channels, height, width = map(min, extent(a), extent(b))
    return (
        [[pooled(plane, height, width) for plane in image[:channels]] for image in m]
        for m in (a, b)
    )


def target_by_hand(teacher, stride, share):
    """Every channel's mean over the level and those lower levels that have this channel."""
    lower = [k for k in sorted(teacher) if k < stride]
    lower = {"dense": lower, "adjacent": lower[-1:], "none": []}[share]
    channels, height, width = extent(teacher[stride])
    result = []
    for n, own in enumerate(teacher[stride]):
        result.append([])
        for c in range(channels):
            planes = [own[c]]
            planes += [
                pooled(teacher[k][n][c], height, width) for k in lower if c < len(teacher[k][n])
            ]
            result[-1].append(
                [
                    [sum(p[y][x] for p in planes) / len(planes) for x in range(width)]
                    for y in range(height)
                ]
            )
    return result


#: Which elements share a mean and a variance.
GROUPS = {
    "channel": lambda n, c, y, x: c,
    "instance": lambda n, c, y, x: (n, c),
    "position": lambda n, c, y, x: (n, y, x),
}
ELEMENT = {
    "mse": lambda d: d * d,
    "l1": abs,
    "smooth_l1": lambda d: 0.5 * d * d if abs(d) < 1 else abs(d) - 0.5,
}


def standardised(values, normalize):
    """{(n, c, y, x): value} with zero mean and unit variance per group."""
    if normalize == "none":
        return values
    groups = defaultdict(list)
    for index, value in values.items():
        groups[GROUPS[normalize](*index)].append(value)
    moments = {}
    for key, group in groups.items():
        mean = sum(group) / len(group)
        moments[key] = mean, sqrt(sum((v - mean) ** 2 for v in group) / len(group) + 1e-6)
    result = {}
    for index, value in values.items():
        mean, deviation = moments[GROUPS[normalize](*index)]
        result[index] = (value - mean) / deviation
    return result


def distance_by_hand(a, b, stride, sizes, distance="mse", normalize="none"):
    """Mean over the positions whose first pixel lies on its image; ``sizes``: None counts all."""
    channels, height, width = extent(a)
    where = [
        (n, y, x)
        for n in range(len(a))
        for y in range(height)
        for x in range(width)
        if sizes is None or (y * stride < sizes[n][0] and x * stride < sizes[n][1])
    ]
    a, b = (
        standardised(
            {(n, c, y, x): m[n][c][y][x] for n, y, x in where for c in range(channels)}, normalize
        )
        for m in (a, b)
    )
    if distance != "cosine":
        return sum(ELEMENT[distance](a[i] - b[i]) for i in a) / len(a)
    each = []
    for n, y, x in where:
        u, v = ([m[n, c, y, x] for c in range(channels)] for m in (a, b))
        lengths = sqrt(sum(p * p for p in u)) * sqrt(sum(q * q for q in v))
        # A vector of zeros is at right angles to everything.
        each.append(1 - (sum(p * q for p, q in zip(u, v)) / lengths if lengths else 0))
    return sum(each) / len(each)


def identical_by_hand(student, teacher, sizes, share="dense", **kind):
    terms = {}
    for stride in sorted(set(student) & set(teacher)):
        s, t = aligned(student[stride], target_by_hand(teacher, stride, share))
        terms[f"s{stride}"] = distance_by_hand(s, t, stride, sizes, **kind)
    return terms


def cross_by_hand(learner, target, sizes, pairs="dense", direction="mutual", **kind):
    """``learner`` and ``target`` are the same maps; apart, only the first are differentiated."""
    strides, terms = sorted(learner), {}
    for i, shallow in enumerate(strides):
        for deep in strides[i + 1 :] if pairs == "dense" else strides[i + 1 : i + 2]:
            value = 0.0
            if direction in ("mutual", "deep_to_shallow"):
                s, d = aligned(learner[shallow], target[deep])
                value += distance_by_hand(s, d, deep, sizes, **kind)
            if direction in ("mutual", "shallow_to_deep"):
                s, d = aligned(target[shallow], learner[deep])
                value += distance_by_hand(s, d, deep, sizes, **kind)
            terms[f"s{shallow}_s{deep}"] = value
    return terms


# --- values --------------------------------------------------------------------------------------

#: Cases where something is constant: a rounding error is divided by the root of a tiny variance.
FLAT = {
    "zeros": dict(fills=(0.0, 0.0)),
    "zeros of the student": dict(fills=(0.0, None)),
    "zeros of the teacher": dict(fills=(None, 0.0)),
    "constants": dict(fills=(-2.5, 1.5)),
    "a constant level": dict(flat=[16]),
    "one pixel": dict(strides=(16, 32), padded=(16, 16), images=1),
    "a pixel per image": dict(strides=(32, 64), padded=(64, 64)),
    "an image of one pixel among others": dict(sizes=[CANVAS, (7, 8)]),
}
CASES = {
    "odd size": {},
    "odd size, deep": dict(strides=(16, 32, 64), padded=(136, 104)),
    "whole cells": dict(padded=(64, 32)),
    "one image": dict(images=1),
    "wider upwards": dict(ours={8: 2, 16: 3, 32: 5}, theirs={8: 2, 16: 4, 32: 6}),
    "narrower upwards": dict(ours={8: 5, 16: 3, 32: 2}, theirs={8: 4, 16: 2, 32: 3}),
    "levels that the other lacks": dict(strides=(8, 16, 64), teachers=(4, 16, 32, 64)),
    "padding": dict(sizes=PADDING["sizes"]),
    "padding of whole cells": dict(padded=(64, 64), sizes=[(64, 32), (32, 64)]),
    "padding around all": dict(padded=(64, 80), sizes=[(33, 72), (50, 9)]),
    "padding, unequal widths": dict(
        ours={8: 2, 16: 3, 32: 5}, theirs={8: 3, 16: 2, 32: 4}, sizes=PADDING["sizes"]
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_identical_layer_value(case, distance, normalize):
    student, teacher, sizes, ignores = given(case)
    kind = dict(distance=distance, normalize=normalize)
    for share in SHARES:
        for ignore in ignores:
            loss = IdenticalLayer(share=share, ignore_padding=ignore, **kind)
            terms = bound(loss, student, teacher)(batch(student, teacher, sizes=sizes))
            expected = identical_by_hand(
                numbers(student["fpn"]),
                numbers(teacher["fpn"]),
                sizes if ignore else None,
                share,
                **kind,
            )
            check_terms(terms, expected, case, (share, ignore))


@pytest.mark.parametrize("case", [k for k in CASES if not k.endswith(("student", "teacher"))])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_cross_layer_value(case, distance, normalize):
    student, _, sizes, ignores = given(case)
    x = numbers(student["fpn"])
    kind = dict(distance=distance, normalize=normalize)
    for ignore in ignores:
        for pairs in PAIRS:
            for direction in DIRECTIONS:
                options = dict(pairs=pairs, direction=direction, **kind)
                loss = bound(CrossLayer(ignore_padding=ignore, **options), student)
                expected = cross_by_hand(x, x, sizes if ignore else None, **options)
                terms = loss(batch(student, sizes=sizes))
                check_terms(terms, expected, case, (pairs, direction, ignore))


@pytest.mark.parametrize("kind", LOSSES)
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


@pytest.mark.parametrize("kind", LOSSES)
def test_defaults_are_the_published_setting(kind):
    student, teacher = pair()
    s, t = numbers(student["fpn"]), numbers(teacher["fpn"])
    by_hand = identical_by_hand if kind is IdenticalLayer else cross_by_hand
    terms = bound(kind(), student, teacher)(batch(student, teacher, **PADDING))
    other = t if kind is IdenticalLayer else s
    check_terms(terms, by_hand(s, other, PADDING["sizes"]), None, "padding is left out")


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", LOSSES)
def test_lower_precision_is_computed_in_float32(kind, normalize):
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = pair(ours={8: 3, 16: 4, 32: 5}, dtype=dtype)
        # The same rounded numbers, so that only the arithmetic differs.
        exact = [{"fpn": {k: x.double() for k, x in m["fpn"].items()}} for m in (student, teacher)]
        loss = bound(kind(normalize=normalize), student, teacher)
        expected = loss(batch(*exact, **PADDING))
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                terms = loss(batch(student, teacher, **PADDING))
            for name, value in terms.items():
                assert value.dtype == torch.float32
                assert value.item() == pytest.approx(expected[name].item(), rel=2e-5)


# --- teacher share: numbers small enough to check by eye -----------------------------------------


@pytest.mark.parametrize("share, stride", [("none", 32), ("dense", 8), ("adjacent", 8)])
def test_without_lower_levels_the_target_is_the_map_itself(share, stride):
    teacher = maps((8, 16, 32))
    assert shared_targets(teacher, [stride], share)[stride] is teacher[stride]


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


def test_a_wider_lower_level_is_cropped():
    wide = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    target = shared_targets({8: wide, 16: torch.ones(1, 2, 1, 1)}, [16], "dense")[16]
    assert target.flatten().tolist() == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize("channels, pooled", [(4, 1), ({8: 2, 16: 4}, 0)])
def test_a_target_of_16_bits_is_written_once(channels, pooled):
    teacher = maps((8, 16), channels, images=3, dtype=torch.bfloat16)
    with Written() as written:
        target = shared_targets(teacher, [16])[16]
    assert target.dtype == torch.float32
    # ... beside the finer map pooled to its size, if that is as wide
    assert [numbers for numbers, _ in written.sizes].count(target.numel()) == 1 + pooled


def test_shared_target_uses_lower_levels_that_the_student_lacks():
    student, teacher = pair((8,), teachers=(4, 8))
    loss = bound(IdenticalLayer(), student, teacher)
    term = loss(batch(student, teacher, padded=CANVAS))["s8"]
    blocks = sum(teacher["fpn"][4][..., i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    square = (student["fpn"][8] - (teacher["fpn"][8] + blocks) / 2) ** 2
    assert term.item() == pytest.approx(square.mean().item(), rel=1e-9)


@pytest.mark.parametrize("kind", LOSSES)
def test_maps_are_left_as_they_are(kind):
    student, teacher = pair(ours={8: 2, 16: 4, 32: 3}, theirs={8: 4, 16: 2, 32: 5})
    before = [{k: x.clone() for k, x in m["fpn"].items()} for m in (student, teacher)]
    for normalize in NORMALIZATIONS:
        loss = bound(kind(normalize=normalize), student, teacher)
        loss(batch(student, teacher, **PADDING))
    for m, old in zip((student, teacher), before):
        assert all(torch.equal(x, old[k]) for k, x in m["fpn"].items())


# --- gradients -----------------------------------------------------------------------------------

#: Two levels whose cells overlap, of a few numbers each; an image of one position on the deeper.
SMALL = dict(strides=(32, 64), ours={32: 3, 64: 4})
SMALL_PADDING = dict(padded=CANVAS, sizes=[(40, 72), (33, 40)])


def gradients(loss, student, **more):
    """Stride -> gradient of the sum of a loss's terms."""
    student = leaves(student)
    total(loss(batch(student, **more))).backward()
    return {stride: x.grad for stride, x in student["fpn"].items()}


def untouched(gradient):
    return gradient is None or not gradient.any()


@pytest.mark.parametrize("ignore", [True, False])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_identical_layer_gradients(distance, normalize, ignore):
    student, teacher = pair(**SMALL)
    options = dict(distance=distance, normalize=normalize, ignore_padding=ignore)
    loss = bound(IdenticalLayer(**options), student, teacher)
    check_gradients(loss, student, teacher, **SMALL_PADDING)


@pytest.mark.parametrize("share", SHARES)
def test_identical_layer_trains_the_student_only(share):
    student, teacher = pair(theirs={8: 2, 16: 3, 32: 5})
    loss = bound(IdenticalLayer(share=share), student, teacher)
    found = check_who_learns(loss, student, teacher, padded=CANVAS)  # nor does the teacher
    assert all(g.any() for g in found.values())


class Once(CrossLayer):
    """Mutual distances with their value counted once, as often as a map's gradient has it."""

    def forward(self, batch):
        return {k: term - term.detach() / 2 for k, term in super().forward(batch).items()}


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_mutual_gradients(distance, normalize):
    student, _ = pair(**SMALL)
    options = dict(distance=distance, normalize=normalize)
    check_gradients(bound(Once(**options), student), student, None, **SMALL_PADDING)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("direction, learns", [("deep_to_shallow", 32), ("shallow_to_deep", 64)])
def test_one_way_gradients(direction, learns, distance, normalize):
    student, _ = pair(**SMALL)
    options = dict(direction=direction, distance=distance, normalize=normalize)
    loss = bound(CrossLayer(**options), student)

    def value(x):
        return total(loss(batch({"fpn": {**student["fpn"], learns: x}}, **SMALL_PADDING)))

    assert torch.autograd.gradcheck(value, [student["fpn"][learns].clone().requires_grad_()])
    found = gradients(loss, student, **SMALL_PADDING)
    assert found.pop(learns).any()
    assert all(untouched(g) for g in found.values())


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("distance, normalize", list(zip(DISTANCES, NORMALIZATIONS)))
def test_cross_layer_gradient_is_that_of_the_loops_with_fixed_targets(
    distance, normalize, direction, pairs
):
    """Three levels: the middle one learns in one pair and is a target in another."""
    sizes = [(40, 72), (33, 50)]
    student, _ = pair((16, 32, 64), ours={16: 2, 32: 3, 64: 2})
    options = dict(pairs=pairs, direction=direction, distance=distance, normalize=normalize)
    found = gradients(bound(CrossLayer(**options), student), student, sizes=sizes)
    learner, target = numbers(student["fpn"]), numbers(student["fpn"])
    step = 1e-5
    for stride, x in student["fpn"].items():
        slopes = torch.zeros_like(x)
        for n, c, row, column in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
            line, value = learner[stride][n][c][row], learner[stride][n][c][row][column]
            for sign in (1, -1):
                line[column] = value + sign * step
                slopes[n, c, row, column] += sign * sum(
                    cross_by_hand(learner, target, sizes, **options).values()
                )
            line[column] = value
        slopes /= 2 * step
        if untouched(found[stride]):
            # Only the end of the pyramid that has nobody to learn from.
            assert stride == {"deep_to_shallow": 64, "shallow_to_deep": 16}.get(direction)
            assert not slopes.any()
        else:
            assert torch.allclose(found[stride], slopes, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_mutual_is_the_sum_of_both_one_way_losses(distance, normalize, pairs):
    student, _ = pair((8, 16, 32, 64), ours={8: 2, 16: 4, 32: 3, 64: 3})
    values, found = {}, {}
    for direction in DIRECTIONS:
        options = dict(pairs=pairs, distance=distance, normalize=normalize)
        loss = bound(CrossLayer(direction=direction, **options), student)
        values[direction] = loss(batch(student, **PADDING))
        found[direction] = gradients(loss, student, **PADDING)
    mutual, *one_way = (values[d] for d in DIRECTIONS)
    for name, value in mutual.items():
        assert value.item() == pytest.approx(sum(v[name].item() for v in one_way), rel=1e-9)
    mutual, *one_way = (found[d] for d in DIRECTIONS)
    for stride, gradient in mutual.items():
        both = sum(g[stride] for g in one_way if g[stride] is not None)
        assert gradient.any() and torch.allclose(gradient, both, rtol=1e-9, atol=1e-12)


EXTREMES = {
    "zeros": dict(fills=(0.0, 0.0)),
    "zeros beside numbers": dict(fills=(0.0, None)),
    "constants": dict(fills=(0.1, -7.3)),
    "equal constants": dict(fills=(0.1, 0.1)),
    "a constant level": dict(flat=[16]),
    "one pixel": dict(strides=(32, 64), padded=(32, 32), images=1),
    "a pixel per image": dict(strides=(32, 64), padded=(32, 32)),
    "large constants": dict(fills=(1e3, -1e3)),
    "large": dict(scale=1e3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("case", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("kind", LOSSES)
def test_extremes_have_finite_values_and_gradients(kind, case, distance, dtype):
    case = dict(case)
    scale = case.pop("scale", 1)
    pyramids = pair(dtype=dtype, **case)
    pyramids = [{"fpn": {k: scale * x for k, x in m["fpn"].items()}} for m in pyramids]
    padded = case.get("padded", CANVAS)
    smaller = [padded] + [(9, 17)] * (len(pyramids[0]["fpn"][32]) - 1)
    for normalize in NORMALIZATIONS:
        loss = bound(kind(distance=distance, normalize=normalize), *pyramids)
        for sizes in (None, smaller):
            check_who_learns(loss, *pyramids, padded=padded, sizes=sizes)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_maps_have_no_distance(distance, normalize):
    student, _ = pair((8, 16))
    kind = dict(distance=distance, normalize=normalize)
    terms = bound(IdenticalLayer(share="none", **kind), student, student)(batch(student, student))
    twin = {"fpn": dict.fromkeys((8, 16), student["fpn"][16])}  # levels of one size need no pooling
    terms.update(bound(CrossLayer(**kind), twin)(batch(twin)))
    assert set(terms) == {"s8", "s16", "s8_s16"}
    assert all(abs(term.item()) < 1e-6 for term in terms.values())


@pytest.mark.parametrize("widths", [(256, 256), (5, 7)])
def test_no_parameters(widths):
    levels = [{"fpn": dict.fromkeys(TWO_STAGE, w)} for w in widths]
    for loss in (IdenticalLayer(), CrossLayer()):
        loss.bind(*levels, "key")
        assert parameters(loss) == 0 and not loss.state_dict()


# --- images and padding --------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [CANVAS, (64, 96)], ids=["unpadded", "padded"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_batch_of_equally_sized_images_has_the_mean_of_its_images(kind, distance, padded):
    student, teacher = pair(padded=padded, images=3)
    for m in (student, teacher):  # images far from alike, and not in the same way for both
        for k, x in m["fpn"].items():
            x[1] = 3 * x[1] + 2
            x[2] = x[2] ** 2
    for normalize in NORMALIZATIONS:
        loss = bound(kind(distance=distance, normalize=normalize), student, teacher)
        whole = loss(batch(student, teacher, sizes=[CANVAS] * 3))
        singles = []
        for i in range(3):
            one = [
                {"fpn": {k: x[i : i + 1] for k, x in m["fpn"].items()}} for m in (student, teacher)
            ]
            singles.append(loss(batch(*one, sizes=[CANVAS])))
        for name, value in whole.items():
            mean = sum(x[name].item() for x in singles) / 3
            same = value.item() == pytest.approx(mean, rel=1e-9)
            assert same is (normalize != "channel"), (normalize, name)  # its statistics are shared


def on_a_canvas(levels, sizes, padded, seed):
    """The same maps of images of these sizes, with noise where a larger canvas shows padding."""
    noise = maps(levels, 3, padded, len(sizes), seed)
    for stride, x in levels.items():
        noise[stride] *= 20
        for n, (height, width) in enumerate(sizes):
            h, w = height // stride, width // stride
            noise[stride][n, :, :h, :w] = x[n, :, :h, :w]
    return {"fpn": noise}


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("kind", LOSSES)
def test_how_far_an_image_is_padded_counts_only_if_asked_for(kind, distance, normalize):
    """Promised where every stride divides images and canvas; else a cell mixes in some padding."""
    sizes = [(64, 96), (32, 64)]
    student, teacher = pair(padded=(64, 96))
    for ignore in (True, False):
        options = dict(distance=distance, normalize=normalize, ignore_padding=ignore)
        loss = bound(kind(**options), student, teacher)
        clean = loss(batch(student, teacher, sizes=sizes))
        for padded in ((64, 96), (96, 96), (64, 160), (128, 128)):
            wider = [
                on_a_canvas(m["fpn"], sizes, padded, seed)
                for m, seed in ((student, 8), (teacher, 9))
            ]
            other = loss(batch(*wider, sizes=sizes))
            for name, value in clean.items():
                same = other[name].item() == pytest.approx(value.item(), rel=1e-9)
                assert same is ignore, (padded, name)


@pytest.mark.parametrize("kind", LOSSES)
def test_an_image_has_its_loss_without_the_padding(kind):
    student, teacher = pair(padded=(64, 96), images=1)
    for normalize in NORMALIZATIONS:
        loss = bound(kind(normalize=normalize), student, teacher)
        padded = loss(batch(student, teacher, sizes=[(32, 64)]))
        cut = [
            {"fpn": {k: x[..., : 32 // k, : 64 // k] for k, x in m["fpn"].items()}}
            for m in (student, teacher)
        ]
        for name, value in loss(batch(*cut, sizes=[(32, 64)])).items():
            assert padded[name].item() == pytest.approx(value.item(), rel=1e-9)


def test_ignored_padding_has_no_gradient():
    student, teacher = pair((16, 32), padded=(64, 96))
    sizes = [(64, 96), (32, 64)]
    for kind in LOSSES:
        for normalize in NORMALIZATIONS:
            for ignore in (True, False):
                loss = bound(kind(normalize=normalize, ignore_padding=ignore), student, teacher)
                found = gradients(loss, student, teacher=teacher, sizes=sizes)
                for stride, g in found.items():
                    h, w = 32 // stride, 64 // stride
                    assert g[1, :, :h, :w].any() and g[0].any()
                    beyond = g[1, :, h:].any() or g[1, :, :, w:].any()
                    assert bool(beyond) is not ignore, (kind, normalize, stride)


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


def test_cross_layer_pairs():
    student, _ = pair((4, 8, 16, 32))
    dense = bound(CrossLayer(pairs="dense"), student).level_pairs()
    assert dense == [(4, 8), (4, 16), (4, 32), (8, 16), (8, 32), (16, 32)]
    adjacent = bound(CrossLayer(pairs="adjacent"), student).level_pairs()
    assert adjacent == [(4, 8), (8, 16), (16, 32)]


@pytest.mark.parametrize(
    "student, teacher", [(TWO_STAGE, ONE_STAGE), (ONE_STAGE, TWO_STAGE)], ids=["4..64", "8..128"]
)
def test_mixed_pyramids_meet_on_their_common_strides(student, teacher):
    student, teacher = pair(student, teachers=teacher, padded=(64, 96))
    loss = bound(IdenticalLayer(share="none"), student, teacher)
    assert loss.strides == [8, 16, 32, 64]
    terms = loss(batch(student, teacher))
    for stride in loss.strides:  # matched by stride, not by position
        square = (student["fpn"][stride] - teacher["fpn"][stride]) ** 2
        assert terms[f"s{stride}"].item() == pytest.approx(square.mean().item(), rel=1e-9)


def test_strides_option():
    student, teacher = pair(TWO_STAGE, teachers=ONE_STAGE)
    assert bound(IdenticalLayer(strides=[32, 8]), student, teacher).strides == [8, 32]
    some = bound(CrossLayer(strides=[64, 4, 16]), student)
    assert some.level_pairs() == [(4, 16), (4, 64), (16, 64)]
    assert list(some(batch(student, padded=CANVAS))) == ["s4_s16", "s4_s64", "s16_s64"]
    assert bound(CrossLayer(), student, teacher).strides == list(TWO_STAGE)  # reads no teacher


def test_taps():
    assert IdenticalLayer().taps == {"fpn"} and CrossLayer(tap="backbone").taps == {"backbone"}
    assert IdenticalLayer().needs == {"teacher"} and not CrossLayer().needs


FPN = {"fpn": {8: 4, 16: 4}}
BAD_BINDS = {
    "no common stride": (
        IdenticalLayer(),
        FPN,
        {"fpn": {4: 4, 32: 4}},
        "key=IdenticalLayer",
        "in common",
    ),
    "strides not there": (IdenticalLayer(strides=[8, 64]), FPN, FPN, "key.strides=[8, 64]", "[64]"),
    "stride of one only": (
        IdenticalLayer(strides=[16]),
        FPN,
        {"fpn": {8: 4}},
        "key.strides=[16]",
        "usable are [8]",
    ),
    "student lacks tap": (CrossLayer(tap="backbone"), FPN, None, "key.tap=backbone", "student"),
    "teacher lacks tap": (
        IdenticalLayer(tap="backbone"),
        {**FPN, "backbone": {8: 4}},
        FPN,
        "key.tap=backbone",
        "teacher",
    ),
    "one level": (CrossLayer(strides=[8]), FPN, None, "key.strides=[8]", "two strides"),
    "one level there": (CrossLayer(), {"fpn": {32: 4}}, None, "key.strides=[32]", "two strides"),
    "no teacher": (IdenticalLayer(), FPN, None, "key=IdenticalLayer", "model.teacher"),
}


@pytest.mark.parametrize("loss, student, teacher, start, word", BAD_BINDS.values(), ids=BAD_BINDS)
def test_pairs_that_cannot_be_bound(loss, student, teacher, start, word):
    with pytest.raises(ConfigError) as error:
        loss.bind(student, teacher, "key")
    message = str(error.value)
    assert message.startswith(start) and word in message and "\n" not in message


@pytest.mark.parametrize(
    "build, key, choices",
    [
        (lambda: IdenticalLayer(tap="neck"), "tap=neck", ("fpn", "backbone")),
        (lambda: IdenticalLayer(share="some"), "share=some", ("dense", "adjacent", "none")),
        (lambda: CrossLayer(pairs="all"), "pairs=all", ("dense", "adjacent")),
        (
            lambda: CrossLayer(direction="up"),
            "direction=up",
            ("deep_to_shallow", "shallow_to_deep", "mutual"),
        ),
    ],
)
def test_unknown_names(build, key, choices):
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value).startswith(f"{key}:")
    assert all(choice in str(error.value) for choice in choices)


class PerChannel(DistillationLoss):
    """A loss that owns a parameter."""

    needs = frozenset()

    def bind(self, student, teacher, key):
        super().bind(student, teacher, key)
        self.scale = torch.nn.Parameter(torch.ones(student["fpn"][8]))

    def forward(self, batch):
        return {"sum": (batch.student["fpn"][8] * self.scale.view(1, -1, 1, 1)).mean()}


def test_an_own_loss_may_create_parameters_when_bound():
    loss = PerChannel()
    loss.bind(FPN, None, "key")
    assert [p.shape for p in loss.parameters()] == [(4,)]
    assert loss(batch({"fpn": {8: torch.full((1, 4, 2, 2), 3.0)}}))["sum"].item() == 3
