"""FRS: feature richness, both parts, and what a dense head has to have."""

import math

import pytest
import torch
from losses.harness import (
    ONE_STAGE,
    TWO_STAGE,
    batch,
    bound,
    check_gradients,
    check_who_learns,
    maps,
    parameters,
    shapes,
)

from sharedkd.errors import ConfigError
from sharedkd.losses.frs import FRS

STRIDES = (8, 16, 32, 64)


def pyramids(seed, strides=STRIDES, channels=3, scores=4, **options):
    return {
        "fpn": maps(strides, channels, seed=seed, **options),
        "logits": maps(strides, scores, seed=seed + 100, **options),
    }


def raw(**options):
    """Weights that differ, and no adapter."""
    return FRS(feature=0.3, response=0.7, **{"adapter": 0, **options})


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def by_hand(student, teacher, feature, response, strides=STRIDES):
    """Position by position, with the BCE on sigmoids as the paper writes it."""
    terms = {}
    for stride in strides:
        f_s, f_t = student["fpn"][stride].tolist(), teacher["fpn"][stride].tolist()
        z_s, z_t = student["logits"][stride].tolist(), teacher["logits"][stride].tolist()
        n, k, height, width = teacher["logits"][stride].shape
        total = squares = entropies = 0.0
        for i in range(n):
            for y in range(height):
                for x in range(width):
                    scores = [sigmoid(z_t[i][c][y][x]) for c in range(k)]
                    richness = max(scores)
                    total += richness
                    for c in range(len(f_t[i])):
                        squares += richness * (f_t[i][c][y][x] - f_s[i][c][y][x]) ** 2
                    for c in range(k):
                        p, q = sigmoid(z_s[i][c][y][x]), scores[c]
                        entropies -= richness * (q * math.log(p) + (1 - q) * math.log(1 - p))
        terms[f"s{stride}_feature"] = feature * squares / total
        terms[f"s{stride}_response"] = response * entropies / total
    return terms


def same(found, expected, rel=1e-9):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=rel, abs=1e-12), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"images": 1},
        {"padded": (40, 72)},
        {"padded": (8, 8)},  # one position on every level
    ],
    ids=["two images", "one image", "odd", "one pixel"],
)
def test_values(options):
    student, teacher = pyramids(0, **options), pyramids(1, **options)
    given = batch(student, teacher, padded=options.get("padded", (64, 96)))
    same(bound(raw(), student, teacher)(given), by_hand(student, teacher, 0.3, 0.7))


@pytest.mark.parametrize("fill", [0.0, 2.5, -9.0])
def test_constant_maps(fill):
    student, teacher = pyramids(0, fill=fill), pyramids(1)
    for s, t in ((student, teacher), (teacher, student), (student, student)):
        same(bound(raw(), s, t)(batch(s, t)), by_hand(s, t, 0.3, 0.7))


def test_adapter_brings_the_student_to_the_teachers_width():
    student, teacher = pyramids(0, channels=2), pyramids(1, channels=5)
    loss = bound(FRS(feature=0.3, response=0.7), student, teacher)
    adapted = dict(student, fpn={})
    for stride in STRIDES:
        conv = loss.adapters[str(stride)]
        adapted["fpn"][stride] = torch.nn.functional.conv2d(
            student["fpn"][stride], conv.weight, conv.bias, padding=1
        )
    same(loss(batch(student, teacher)), by_hand(adapted, teacher, 0.3, 0.7))


def test_a_level_where_the_teacher_sees_nothing_is_zero():
    student, teacher = pyramids(0, dtype=torch.float32), pyramids(1, dtype=torch.float32)
    teacher["logits"] = {s: torch.full_like(x, -1e4) for s, x in teacher["logits"].items()}
    loss = bound(FRS(feature=1.0, response=1.0), student, teacher)
    for x in (y for levels in student.values() for y in levels.values()):
        x.requires_grad_()
    terms = loss(batch(student, teacher))
    assert all(x.item() == 0 for x in terms.values())
    sum(terms.values()).backward()
    assert all(not x.grad.any() for levels in student.values() for x in levels.values())
    assert all(not p.grad.any() for p in loss.parameters())


def test_extreme_logits_stay_finite():
    student, teacher = pyramids(0, dtype=torch.float32), pyramids(1, dtype=torch.float32)
    for levels in (student["logits"], teacher["logits"]):
        for stride in levels:
            levels[stride] = levels[stride] * 1e3
    check_who_learns(bound(FRS(1.0, 1.0), student, teacher), student, teacher)


def test_gradients():
    options = dict(strides=(8, 16), channels=2, scores=2, padded=(16, 24))
    student, teacher = pyramids(0, **options), pyramids(1, **options)
    loss = bound(FRS(0.3, 0.7), student, teacher)
    check_gradients(loss, student, teacher, padded=(16, 24))


@pytest.mark.parametrize("adapter", [0, None, 1, 3])
def test_who_learns(adapter):
    student, teacher = pyramids(0), pyramids(1)
    gradients = check_who_learns(
        bound(raw(adapter=adapter), student, teacher), student, teacher, sizes=[(64, 96), (40, 50)]
    )
    assert all(g.any() for g in gradients.values())


@pytest.mark.parametrize("channels", [256, 6])
def test_parameters(channels):
    there = {tap: dict.fromkeys(ONE_STAGE, c) for tap, c in (("fpn", channels), ("logits", 9))}
    loss = FRS(0.005, 0.02)
    loss.bind(there, there, "key")
    assert parameters(loss) == 5 * (9 * channels**2 + channels)
    assert channels != 256 or parameters(loss) == 2_950_400
    assert len(loss.state_dict()) == 10
    loss = FRS(0.005, 0.02, adapter=None)
    loss.bind(there, there, "key")
    assert parameters(loss) == 0


def test_a_batch_of_the_same_image_twice_changes_nothing():
    student, teacher = pyramids(0, images=1), pyramids(1, images=1)
    loss = bound(raw(), student, teacher)
    once = loss(batch(student, teacher))
    twice = [
        {tap: {s: torch.cat([x, x]) for s, x in levels.items()} for tap, levels in maps_.items()}
        for maps_ in (student, teacher)
    ]
    same(loss(batch(*twice)), {name: x.item() for name, x in once.items()})


def test_only_the_levels_in_use():
    student, teacher = pyramids(0, TWO_STAGE), pyramids(1, ONE_STAGE)
    loss = bound(raw(strides=[16, 64]), student, teacher)
    same(loss(batch(student, teacher)), by_hand(student, teacher, 0.3, 0.7, (16, 64)))


def test_types():
    student, teacher = pyramids(0), pyramids(1)
    loss = bound(raw(adapter=3), student, teacher)
    exact = loss(batch(student, teacher))

    def cast(levels, dtype):
        return {tap: {s: x.to(dtype) for s, x in found.items()} for tap, found in levels.items()}

    for dtype, rel in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        terms = loss.float()(batch(cast(student, dtype), cast(teacher, dtype)))
        for name, x in terms.items():
            assert x.dtype == torch.float32 and x.item() == pytest.approx(
                exact[name].item(), rel=rel
            )
    with torch.autocast("cpu", torch.bfloat16):
        terms = loss(batch(cast(student, torch.bfloat16), cast(teacher, torch.bfloat16)))
    assert all(x.dtype == torch.float32 and torch.isfinite(x) for x in terms.values())


def refused(loss, student, teacher):
    with pytest.raises(ConfigError) as error:
        loss.bind(shapes(student), shapes(teacher), "key")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_pairs_that_cannot_be_bound():
    student, teacher = pyramids(0), pyramids(1, scores=1)
    message = refused(FRS(1, 1), student, teacher)
    assert message.startswith("key=FRS:") and "4 channels" in message and "teacher's 1:" in message
    message = refused(raw(), student, pyramids(1, channels=5))
    assert message.startswith("key.adapter=0:")
    message = refused(FRS(1, 1), student, {"fpn": teacher["fpn"]})
    assert message.startswith("key.tap=logits:") and "teacher" in message
    assert FRS(1, 1).taps == {"fpn", "logits"} and FRS(1, 1).needs == {"teacher"}


@pytest.mark.parametrize("key, value", [("feature", -1.0), ("response", float("nan"))])
def test_bad_weights(key, value):
    with pytest.raises(ConfigError) as error:
        FRS(**{"feature": 1.0, "response": 1.0, key: value})
    assert str(error.value).startswith(f"{key}={value}: ")
