"""ImprovedKD: attention, drawn positions, one student level against several teacher levels."""

import math

import numpy as np
import torch
from losses import harness
from losses.harness import TWO_STAGE, averaged, convolved, maps, numbers, pair

from sharedkd.losses.improved_kd import ImprovedKD, attention


def attention_by_hand(x):
    """(C, H, W) array -> (H, W) array."""
    _, h, w = x.shape
    m = np.array([[np.mean(np.abs(x[:, i, j])) for j in range(w)] for i in range(h)])
    m += [[np.max(np.abs(x[:, i, j])) for j in range(w)] for i in range(h)]
    e = np.exp((m - m.mean()) / math.sqrt(((m - m.mean()) ** 2).mean() + 1e-6))
    return e / e.sum()


def resized_by_hand(x, h, w):
    """(C, H, W) array -> (C, h, w): means of the cells below, or the cell at the same place."""
    _, height, width = x.shape
    if h * w <= height * width:
        return averaged(x, h, w)
    return x[:, np.arange(h) * height // h][:, :, np.arange(w) * width // w]


def by_hand(loss, student, teacher, boxes, sizes):
    strides, terms = list(student["fpn"]), {}
    weights = drawn_by_hand(teacher["fpn"], loss.samples)
    for a, i in enumerate(strides):
        pairs = []
        for b, j in enumerate(strides):
            if abs(a - b) > loss.reach:
                continue
            conv = numbers(loss.fam[str(i)][str(j)])
            s, t = student["fpn"][i], teacher["fpn"][j]
            images = []
            for n in range(len(t)):
                x = convolved(conv, "", resized_by_hand(s[n], *t.shape[2:]))
                images.append((weights[j][n] * ((x - t[n]) ** 2).mean(0)).sum())
            pairs.append(np.mean(images))
        terms[f"s{i}"] = np.mean(pairs)
    return terms


def drawn_by_hand(teacher, samples):
    """Stride -> image -> (H, W) shares of the loss's draws, from attention computed by hand."""
    shares = {}
    for stride, t in teacher.items():
        a = np.stack([attention_by_hand(x) for x in t])
        n, h, w = a.shape
        count = math.ceil(samples * h * w)
        drawn = torch.multinomial(torch.from_numpy(a.reshape(n, -1)), count, replacement=True)
        shares[stride] = [
            np.bincount(row.numpy(), minlength=h * w).reshape(h, w) / count for row in drawn
        ]
    return shares


CASES = {
    "two-stage strides": ({}, dict(strides=TWO_STAGE, images=1, padded=(64, 64))),
    "own levels only": (dict(reach=0), {}),
    "reach two, few samples": (dict(reach=2, samples=0.1), {}),
    "every level": (dict(reach=9, samples=1.0), dict(ours=4)),
    "one position on the coarser": ({}, dict(strides=(32, 64, 128), padded=(64, 32))),
    "constant": ({}, dict(fills=(3.0, 3.0))),
}


@harness.every_case(ImprovedKD, CASES)
def test_value(options, given):
    harness.check_value(
        ImprovedKD(**options), by_hand, **{"strides": (8, 16, 32), "theirs": 4, **given}
    )


def test_attention():
    x = maps((8,), 5)[8]
    a = attention(x)
    expected = np.stack([attention_by_hand(each).ravel() for each in x.numpy()])
    assert a.shape == (2, 96) and np.allclose(a.numpy(), expected, rtol=1e-9)
    assert torch.allclose(attention(1e3 * x), a, rtol=1e-4)  # of the teacher's scale no matter
    assert torch.allclose(attention(-x), a)
    assert torch.equal(attention(x[:1]), a[:1])  # nor of the batch
    even = torch.full_like(a, 1 / 96)
    for constant in (0.0, 7.0):
        assert torch.allclose(attention(torch.full_like(x, constant)), even)
    assert attention(x[..., :1, :1]).tolist() == [[1.0], [1.0]]


def test_share_of_positions():
    _, teacher = pair((8,), padded=(64, 96))
    for samples, count in ((1e-9, 1), (0.5, 48), (0.501, 49), (1.0, 96)):
        shares = ImprovedKD(samples=samples).draw(teacher["fpn"][8])
        assert shares.shape == (2, 1, 8, 12)
        assert torch.allclose(shares.sum((1, 2, 3)), torch.ones(2, dtype=torch.float64))
        assert torch.allclose(shares * count, (shares * count).round())


def test_teacher_that_overflows_is_not_hidden():
    student, teacher = pair((8, 16))
    teacher["fpn"][8][0, 0, 0, 0] = math.inf
    terms = harness.bound(ImprovedKD(reach=0), student, teacher)(harness.batch(student, teacher))
    assert not torch.isfinite(terms["s8"]) and torch.isfinite(terms["s16"])


def test_levels_in_use():
    student, teacher = pair(TWO_STAGE)
    loss = harness.bound(ImprovedKD(strides=[8, 32, 64]), student, teacher)
    assert {s: list(near) for s, near in loss.fam.items()} == {
        "8": ["8", "32"],
        "32": ["8", "32", "64"],
        "64": ["32", "64"],
    }
    assert list(loss(harness.batch(student, teacher))) == ["s8", "s32", "s64"]
