"""PGD: qualities, Gaussians and weighted differences, position by position."""

import numpy as np
import pytest
import torch
from losses.harness import batch, bound, convolved, detector, iou, numbers, same, truth

from sharedkd.losses import PGD
from sharedkd.losses.pgd import JITTER, gaussian, quality

PADDED, SIZES = (64, 96), [(40, 90), (64, 96)]  # the first image ends within the padding
BOXES = [[[3, 5, 60, 38], [10, 10, 45, 30]], [[5, 5, 90, 60], [50, 8, 80, 40], [20, 20, 21, 21]]]
CLASSES = [[0, 1], [1, 1, 0]]  # the last box holds no centre


def given(widths=(3, 3), boxes=BOXES, classes=CLASSES):
    student, teacher = (detector((8, 16), width, seed=10 * i) for i, width in enumerate(widths))
    inputs = [truth(b, size, c) for b, size, c in zip(boxes, SIZES, classes)]
    return student, teacher, inputs


def run(student, teacher, inputs, **options):
    weights = dict(foreground=0.3, background=0.7, box=1.1, attention=0.9, positions=5)
    loss = bound(PGD(**{**weights, **options}), student, teacher)
    given = batch(student, teacher, sizes=SIZES)
    given.inputs = inputs
    return loss(given), loss


def guided(teacher, box, kind, image, xi, positions=5):
    """{(stride, y, x): weight} of one object."""
    found = {}
    for stride, b in teacher["boxes"].items():
        z = teacher["logits"][stride][image].numpy()
        for y, x in np.ndindex(*b.shape[2:]):
            cx, cy = (x + 0.5) * stride, (y + 0.5) * stride
            if box[0] < cx < box[2] and box[1] < cy < box[3]:
                each = [
                    (1 / (1 + np.exp(-z[2 * a + kind, y, x]))) ** (1 - xi)
                    * iou(b[image, 4 * a : 4 * a + 4, y, x].tolist(), box) ** xi
                    for a in range(2)
                ]
                found[stride, y, x] = max(each)
    best = sorted((k for k in found if found[k] > 0), key=found.get)[-positions:]
    points = np.array([[(x + 0.5) * s, (y + 0.5) * s] for s, y, x in best])
    if not best:
        return {}
    apart = points - points.mean(0)
    inverse = np.linalg.inv(apart.T @ apart / len(best) + JITTER * np.eye(2))
    return {k: np.exp(-d @ inverse @ d / 2) for k, d in zip(best, apart)}


def by_hand(student, teacher, loss):
    found, parts = {}, numbers(loss)
    for stride in (8, 16):
        t = teacher["fpn"][stride].numpy()
        adapt = {k: parts[f"adapt.{stride}.{k}"] for k in ("weight", "bias")} if parts else {}
        s = np.stack([convolved(adapt, "", x) for x in student["fpn"][stride].numpy()])
        n, c, h, w = t.shape
        fg = bg = box = attention = 0.0
        boxed, moved = 0, 0.0
        for i, (height, width) in enumerate(SIZES):
            inside = [
                (y, x) for y, x in np.ndindex(h, w) if y * stride < height and x * stride < width
            ]

            def spatial(m):
                e = {p: np.exp(abs(m[i, :, p[0], p[1]]).mean() / 0.8) for p in inside}
                return {p: len(inside) * v / sum(e.values()) for p, v in e.items()}

            def channel(m, p):
                e = np.exp(abs(m[i, :, p[0], p[1]]) / 0.8)
                return c * e / e.sum()

            def mask(xi):
                each = [guided(teacher, b, k, i, xi) for b, k in zip(BOXES[i], CLASSES[i])]
                keys = {(y, x) for m in each for s_, y, x in m if s_ == stride}
                return {p: max(m.get((stride, *p), 0) for m in each) for p in keys}

            by_score, by_box, p_s, p_t = mask(0.8), mask(0.6), spatial(s), spatial(t)
            outside = [
                (y, x)
                for y, x in inside
                if not any(
                    b[0] < (x + 0.5) * stride < b[2] and b[1] < (y + 0.5) * stride < b[3]
                    for b in BOXES[i]
                )
            ]
            for p in inside:
                gap = channel(t, p) * (t[i, :, p[0], p[1]] - s[i, :, p[0], p[1]]) ** 2
                apart = abs(channel(s, p) - channel(t, p)).sum()
                fg += by_score.get(p, 0) * p_t[p] * gap.sum() / max(len(by_score), 1)
                bg += (p in outside) * p_t[p] * gap.sum() / max(len(outside), 1)
                attention += apart / len(inside) + abs(p_s[p] - p_t[p])
                box += by_box.get(p, 0) * gap.mean()
                moved += (p in by_box) * apart
            boxed += len(by_box)
        level = {8: 1, 16: 1.25}[stride]
        found[f"s{stride}_foreground"] = 0.3 * level * fg / n
        found[f"s{stride}_background"] = 0.7 * level * bg / n
        found[f"s{stride}_box"] = 1.1 * box / max(boxed, 1)
        found[f"s{stride}_attention"] = 0.9 * (attention / n + moved / max(boxed, 1))
    return found


@pytest.mark.parametrize("widths", [(3, 3), (2, 4)])
def test_value(widths):
    student, teacher, inputs = given(widths)
    terms, loss = run(student, teacher, inputs)
    same(terms, by_hand(student, teacher, loss), rel=1e-6)


def test_quality_by_hand():
    """Scores 0.64 and 0.25 of class 1, IoU 1/4 and 1: 0.8 * 0.5 and 0.5 * 1 at xi 0.5."""
    scores = torch.tensor([[[[0.1], [0.64]], [[0.9], [0.25]]]])  # (N, A, K, R)
    predicted = torch.tensor([[[[0.0, 0, 2, 2]], [[0, 0, 4, 4]]]])
    boxes, classes = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 0, 0]]]), torch.tensor([[1, 0]])
    found = quality(scores, predicted, boxes, classes, [0.5, 0.0])
    assert found.flatten().tolist() == pytest.approx([0.5, 0, 0.64, 0.9])  # 0: the score alone


def test_gaussian_through_a_line_and_a_point():
    """At the four best of a diagonal line the distances are -3, -1, 1 and 3 over sqrt(5)."""
    centres = torch.tensor([[8.0, 8], [16, 16], [24, 24], [32, 32], [40, 40]])
    found = gaussian(torch.tensor([[[0.5, 0.6, 0.7, 0.8, 0.1], [0, 0, 0.3, 0, 0]]]), centres, 4)
    line = [np.exp(-(d**2) / 10) for d in (3, 1, 1, 3)]
    assert found[0, 0].tolist() == pytest.approx([*line, 0], rel=1e-4)
    assert found[0, 1].tolist() == [0, 0, 1, 0, 0]


def test_without_objects_and_with_more_than_a_chunk():
    student, teacher, _ = given()
    terms, _ = run(student, teacher, [truth([], size) for size in SIZES])
    assert terms["s8_foreground"] == 0 == terms["s8_box"] and terms["s8_background"] > 0
    student, teacher, inputs = given()
    expected, _ = run(student, teacher, inputs)
    many = [truth(b * 20, size, c * 20) for b, size, c in zip(BOXES, SIZES, CLASSES)]
    found, _ = run(student, teacher, many)
    same(found, {k: v.item() for k, v in expected.items()})
