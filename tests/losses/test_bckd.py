"""BCKD: binary scores and overlaps of boxes, anchor by anchor."""

import numpy as np
import pytest
import tiny
import torch
from losses.harness import (
    ANCHORS,
    CLASSES,
    batch,
    bound,
    detector,
    iou,
    leaves,
    matched,
    on_image,
    same,
    sigmoid,
    total,
)

from sharedkd import Stage
from sharedkd.losses import BCKD
from sharedkd.losses.dense import giou

SIZES = [(40, 90), (64, 96)]  # the first ends within the padding


def given(**options):
    student, teacher = (detector((8, 16), 3, seed=seed, **options) for seed in (0, 10))
    return student, teacher, dict(sizes=SIZES, labels=matched(student)["labels"])


def run(student, teacher, more, **options):
    loss = bound(BCKD(**{"score": 0.7, "overlap": 1.3, **options}), student, teacher)
    return loss(batch(student, teacher, **more))


def overlap(a, b):
    """The generalised IoU of two boxes: less the share of the box around both that neither covers."""
    whole = [*map(min, a[:2], b[:2]), *map(max, a[2:], b[2:])]
    area, first, second = ((x[2] - x[0]) * (x[3] - x[1]) for x in (whole, a, b))
    either = (first + second) / (1 + iou(a, b))  # as the IoU is both / either
    return iou(a, b) - (area - either) / area


def anchor_by_anchor(student, teacher, labels, sizes):
    """Yield each level's stride, scores and cross-entropies (N, A, K, H, W), and per anchor (N, A, H, W)
    one less the overlap of its boxes, its label, and whether it is on the image."""
    for stride, label in labels.items():
        q, p = (
            sigmoid(m["logits"][stride].unflatten(1, (-1, CLASSES)).numpy())
            for m in (student, teacher)
        )
        entropy = -(p * np.log(q) + (1 - p) * np.log(1 - q))
        boxes = [m["boxes"][stride].unflatten(1, (-1, 4)).numpy() for m in (student, teacher)]
        apart, inside = np.zeros(label.shape), np.zeros(label.shape, bool)
        for n, a, y, x in np.ndindex(*label.shape):
            apart[n, a, y, x] = 1 - overlap(*(b[n, a, :, y, x].tolist() for b in boxes))
        for shown, size in zip(inside, sizes):
            on_image(shown, size, stride)[:] = True
        yield stride, q, p, entropy, apart, label.numpy(), inside


def foreground_of(labels):
    return sum(((x >= 0) & (x < CLASSES)).sum().item() for x in labels.values())


def by_hand(student, teacher, more):
    found, count = {}, max(foreground_of(more["labels"]), 1)
    levels = anchor_by_anchor(student, teacher, more["labels"], SIZES)
    for stride, q, p, entropy, apart, label, inside in levels:
        gap, counted = abs(p - q), inside & (label >= 0)
        found[f"s{stride}_score"] = 0.7 * (gap * entropy).sum(2)[counted].sum() / count
        found[f"s{stride}_overlap"] = 1.3 * (gap.max(2) * apart)[counted].sum() / count
    return found


def test_value():
    student, teacher, more = given()
    same(run(student, teacher, more), by_hand(student, teacher, more))


def test_a_level_without_foreground_counts():
    student, teacher, more = given()
    more["labels"] = {s: torch.full_like(x, CLASSES) for s, x in more["labels"].items()}
    same(run(student, teacher, more), by_hand(student, teacher, more))


def test_giou_by_hand():
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 2, 2], [1, 1, 1, 1]])
    others = torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4], [2, 2, 4, 4], [1, 1, 1, 1]])
    # the same: 1; a half of each: 8 / 24; corner to corner: 0 - 8 / 16; no area at all: finite
    found = giou(boxes.view(1, 16, 1, 1), others.view(1, 16, 1, 1)).flatten()
    assert found.tolist()[:3] == pytest.approx([1, 1 / 3, -0.5]) and torch.isfinite(found).all()


def test_equal_heads_and_padding():
    student, _, more = given()
    terms = run(student, student, more)
    same(terms, dict.fromkeys(terms, 0.0))
    student, teacher, more = given()
    before = total(run(student, teacher, more))
    for levels in (student["logits"], student["boxes"]):
        levels[8][0, :, 5:] = 3.0
        levels[16][0, :, 3:] = 3.0
    assert total(run(student, teacher, more)) == before


def test_gradients():
    """Of scores through the weights; of boxes not, as their weights are held."""
    student, teacher, more = given(padded=(16, 24))
    more["sizes"] = [(16, 24)] * 2

    def value(z, b):
        levels = {
            **student,
            "logits": {**student["logits"], 8: z},
            "boxes": {**student["boxes"], 8: b},
        }
        return run(levels, teacher, more)

    z, b = student["logits"][8], student["boxes"][8]
    assert torch.autograd.gradcheck(
        lambda x: total(value(x, b)) - value(x, b)["s8_overlap"], z.clone().requires_grad_()
    )
    assert torch.autograd.gradcheck(lambda x: total(value(z, x)), b.clone().requires_grad_())
    found = leaves(student)
    run(found, teacher, more, score=0.0)["s8_overlap"].backward()
    assert found["logits"][8].grad is None or not found["logits"][8].grad.any()
    assert found["boxes"][8].shape[1] == 4 * ANCHORS and found["boxes"][8].grad.any()


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_boxes_teach_the_layers_that_predict_them(kind):
    model = tiny.pair({"bckd": Stage(BCKD(score=0.0, overlap=1.0))}, kind)
    losses = tiny.step(model, None, {"bckd": 1.0})
    sum(x for k, x in losses.items() if k.endswith("_overlap")).backward()
    assert model.student.head.bbox_pred.weight.grad.any()
    assert (
        model.student.head.cls_score.weight.grad is None
        or not model.student.head.cls_score.weight.grad.any()
    )
