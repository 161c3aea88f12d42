"""FRS: both parts by hand, and a teacher that finds nothing."""

import numpy as np
import pytest
import torch
from losses.harness import (
    ONE_STAGE,
    TWO_STAGE,
    batch,
    bound,
    maps,
    same,
    sigmoid,
)

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


def by_hand(student, teacher, feature, response, strides=STRIDES):
    """With the BCE on sigmoids as the paper writes it."""
    terms = {}
    for stride in strides:
        f_s, f_t = (m["fpn"][stride].numpy() for m in (student, teacher))
        p, q = (sigmoid(m["logits"][stride].numpy()) for m in (student, teacher))
        richness = q.max(1, keepdims=True)
        squares = (richness * (f_t - f_s) ** 2).sum()
        entropies = -(richness * (q * np.log(p) + (1 - q) * np.log(1 - p))).sum()
        terms[f"s{stride}_feature"] = feature * squares / richness.sum()
        terms[f"s{stride}_response"] = response * entropies / richness.sum()
    return terms


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


def test_adapter_brings_the_student_to_the_teachers_width():
    student, teacher = pyramids(0, channels=2), pyramids(1, channels=5)
    loss = bound(FRS(feature=0.3, response=0.7), student, teacher)
    adapted = dict(student, fpn={})
    for stride in STRIDES:
        conv = loss.adapters[str(stride)]
        adapted["fpn"][stride] = torch.nn.functional.conv2d(
            student["fpn"][stride], conv.weight, conv.bias, padding=1
        ).detach()
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


def test_only_the_levels_in_use():
    student, teacher = pyramids(0, TWO_STAGE), pyramids(1, ONE_STAGE)
    loss = bound(raw(strides=[16, 64]), student, teacher)
    same(loss(batch(student, teacher)), by_hand(student, teacher, 0.3, 0.7, (16, 64)))
