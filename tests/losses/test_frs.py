"""FRS: both parts by hand, and a teacher that finds nothing."""

import numpy as np
import torch
from losses import harness
from losses.harness import ONE_STAGE, TWO_STAGE, convolved, detector, numbers, sigmoid

from sharedkd.losses.frs import FRS


def kd(**options):
    return FRS(feature=0.3, response=0.7, **options)


def by_hand(loss, student, teacher, boxes, sizes):
    """With the BCE on sigmoids as the paper writes it."""
    terms = {}
    for stride in loss.strides:
        adapter = numbers(loss.adapters[str(stride)])
        f_s = np.stack([convolved(adapter, "", x) for x in student["fpn"][stride]])
        f_t = teacher["fpn"][stride]
        p, q = (sigmoid(m["logits"][stride]) for m in (student, teacher))
        richness = q.max(1, keepdims=True)
        squares = (richness * (f_t - f_s) ** 2).sum()
        entropies = -(richness * (q * np.log(p) + (1 - q) * np.log(1 - p))).sum()
        terms[f"s{stride}_feature"] = 0.3 * squares / richness.sum()
        terms[f"s{stride}_response"] = 0.7 * entropies / richness.sum()
    return terms


CASES = {
    "no adapter": (dict(adapter=0), {}),
    "only the levels in use": (dict(strides=[16, 64]), dict(strides=TWO_STAGE, teachers=ONE_STAGE)),
}


@harness.every_case(FRS, CASES)
def test_value(options, given):
    harness.check_value(kd(**options), by_hand, **given)


def test_a_level_where_the_teacher_sees_nothing_is_zero():
    student, teacher = (detector((8, 16), seed=seed, dtype=torch.float32) for seed in (0, 10))
    teacher["logits"] = {s: torch.full_like(x, -1e4) for s, x in teacher["logits"].items()}
    loss = harness.bound(kd(), student, teacher)
    assert not any(loss(harness.batch(student, teacher)).values())
    assert not any(g.any() for g in harness.check_who_learns(loss, student, teacher).values())
    assert not any(p.grad.any() for p in loss.parameters())
