"""DIST: Pearson correlations of class scores, against numpy's."""

import numpy as np
import pytest
import torch
from losses.harness import batch, bound, maps, same, softmax
from losses.test_dkd import FPN, anchors, regions

from sharedkd.losses import DIST, DenseDIST


def dist(given, beta=0.7, gamma=1.3, temperature=2.0):
    return bound(DIST(beta, gamma, temperature), FPN, FPN)(batch(FPN, FPN, regions=given))


def apart(a, b):
    return 1 - np.corrcoef(a, b)[0, 1]


def test_value():
    given = regions(9, 4)
    s, t = (softmax(x.numpy() / 2.0) for x in (given.student, given.teacher))
    inter = np.mean([apart(a, b) for a, b in zip(s, t)])
    intra = np.mean([apart(a, b) for a, b in zip(s.T, t.T)])
    same(dist(given), {"inter": 0.7 * 4 * inter, "intra": 1.3 * 4 * intra})


def test_the_scale_of_scores_is_free():
    """Scores that are an affine map of the teacher's are as good as its own."""
    given = regions(9, 4)
    given.student = (
        0.5 * given.teacher.softmax(1) + 0.1
    ).log()  # the softmax of a log is the row's share
    assert all(
        x.item() == pytest.approx(0, abs=1e-9) for x in dist(given, temperature=1.0).values()
    )


def test_no_regions_and_regions_alike():
    for rows, columns in ((0, 4), (1, 3)):  # of one region a class has no spread
        given = regions(rows, columns)
        given.student.requires_grad_()
        terms = dist(given)
        assert terms["intra"].item() == 0 and (terms["inter"].item() == 0) is (rows == 0)
        sum(terms.values()).backward()
        assert torch.isfinite(given.student.grad).all()


def test_gradients():
    given = regions(5, 4)

    def value(s):
        return sum(dist(type(given)(given.labels, s, given.teacher)).values())

    assert torch.autograd.gradcheck(value, given.student.clone().requires_grad_())


SIZES = [(13, 20), (16, 24)]  # the first image ends within the padding of both levels


def dense(student, teacher, labels):
    loss = bound(DenseDIST(0.7, 1.3), student, teacher)
    return loss(batch(student, teacher, sizes=SIZES, padded=(16, 24), labels=labels))


def dense_by_hand(student, teacher, labels, k):
    """Rows of anchors one by one: (student's scores, teacher's, label)."""
    rows = []
    for stride, each in labels.items():
        for n, a, y, x in np.ndindex(*each.shape):
            height, width = SIZES[n]
            label = each[n, a, y, x].item()
            if label >= 0 and y * stride < height and x * stride < width:
                z = [m["logits"][stride][n, a * k : a * k + k, y, x] for m in (student, teacher)]
                rows.append((*(v.sigmoid().numpy() for v in z), label))
    inter = [apart(s, t) for s, t, label in rows if label < k] if k > 1 else [0]
    s, t = (np.array([row[i] for row in rows]).T for i in (0, 1))
    return {"inter": 0.7 * np.mean(inter), "intra": 1.3 * np.mean([*map(apart, s, t)])}


@pytest.mark.parametrize("k", [1, 3])
def test_dense_value(k):
    student, teacher, labels = anchors((4, 8), k=k)
    same(dense(student, teacher, labels), dense_by_hand(student, teacher, labels, k))


def test_dense_without_foreground():
    student, teacher, labels = anchors((4, 8))
    none = {stride: torch.full_like(x, -1) for stride, x in labels.items()}
    same(dense(student, teacher, none), {"inter": 0, "intra": 0})
    background = {stride: torch.full_like(x, 3) for stride, x in labels.items()}
    same(
        dense(student, teacher, background),
        dense_by_hand(student, teacher, background, 3) | {"inter": 0},
    )


def test_scores_near_zero_keep_their_digits():
    """Scores of 1e-3 that differ in their third digit, of 20,000 anchors, in float32."""
    s, t = (maps((8,), 1, (800, 1600), 1, seed) for seed in (1, 2))
    levels = [{"logits": {8: (0.01 * x[8] - 7)}} for x in (s, t)]
    labels = {8: torch.full((1, 1, 100, 200), 1)}
    exact, single = (
        bound(DenseDIST(0.7, 1.3), *given)(batch(*given, padded=(800, 1600), labels=labels))
        for given in (levels, [{"logits": {8: x["logits"][8].float()}} for x in levels])
    )
    assert single["intra"].item() == pytest.approx(exact["intra"].item(), rel=1e-3)
