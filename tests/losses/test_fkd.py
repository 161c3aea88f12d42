"""FKD: the four norms against a reference by hand, and what the non-local block computes."""

import math

import numpy as np
import pytest
import torch
from losses import harness
from losses.harness import convolved, numbers, pair, softmax

from sharedkd.losses.fkd import FKD, NonLocal

WEIGHTS = dict(feature=0.7, channel=1.1, spatial=1.3, nonlocal_=0.9)
PARTS = ("feature", "channel", "spatial", "nonlocal")


def kd(**options):
    return FKD(**{**WEIGHTS, **options})


def pooled(x, k):
    kh, kw = min(k, x.shape[1]), min(k, x.shape[2])
    rows, columns = x.shape[1] // kh, x.shape[2] // kw
    return [
        x[:, r * kh : (r + 1) * kh, c * kw : (c + 1) * kw].max((1, 2))
        for r in range(rows)
        for c in range(columns)
    ]


def nonlocal_by_hand(p, x, pool):
    ys = []
    for image in x:
        theta = convolved(p, "theta", image)
        keys = pooled(convolved(p, "phi", image), pool)
        values = pooled(convolved(p, "g", image), pool)
        y = sum(
            np.einsum("chw,c->hw", theta, key) / len(keys) * value[:, None, None]
            for key, value in zip(keys, values)
        )
        ys.append(convolved(p, "out", y))
    y, over = np.stack(ys), dict(axis=(0, 2, 3), keepdims=True)
    y = (y - y.mean(**over)) / np.sqrt(y.var(**over) + 1e-5)
    weight, bias = (p[f"norm.{k}"][:, None, None] for k in ("weight", "bias"))
    return x + weight * y + bias


def spatial_mask(image, temperature):
    means = np.abs(image).mean(0)
    return means.size * softmax(means.ravel() / temperature).reshape(means.shape)


def channel_mask(image, temperature):
    return len(image) * softmax(np.abs(image).mean((1, 2)) / temperature)


def by_hand(loss, student, teacher, boxes, sizes):
    expected = {}
    for i, stride in enumerate(loss.strides):
        key, n = str(stride), numbers
        s, t = (x["fpn"][stride] for x in (student, teacher))
        adapt, channel = n(loss.adapt[key]), n(loss.adapt_channel[key])
        spatial, again = n(loss.adapt_spatial[key]), n(loss.adapt_nonlocal[key])
        sums = dict.fromkeys(PARTS, 0.0)
        ours = nonlocal_by_hand(n(loss.student_nonlocal[key]), s, loss.pool[i])
        theirs = nonlocal_by_hand(n(loss.teacher_nonlocal[key]), t, loss.pool[i])
        for a, b, r, q in zip(s, t, ours, theirs):
            adapted = convolved(adapt, "", a)
            T = loss.temperature
            mask = (spatial_mask(a, T) + spatial_mask(b, T))[None] / 2
            if loss.channel_mask:
                source = a if len(a) == len(b) else adapted
                mask = mask * (channel_mask(source, T) + channel_mask(b, T))[:, None, None] / 2
            sums["feature"] += (mask * (b - adapted) ** 2).sum()
            means = channel["weight"] @ a.mean((1, 2)) + channel["bias"]
            sums["channel"] += ((b.mean((1, 2)) - means) ** 2).sum()
            means = convolved(spatial, "", a.mean(0, keepdims=True))
            sums["spatial"] += ((b.mean(0) - means) ** 2).sum()
            sums["nonlocal"] += ((q - convolved(again, "", r)) ** 2).sum()
        for part, weight in zip(PARTS, WEIGHTS.values()):
            expected[f"s{stride}_{part}"] = weight * math.sqrt(sums[part])
    return expected


CASES = {
    "channel mask": (dict(channel_mask=True, temperature=0.1), {}),
    "channel mask, narrower teacher": (dict(channel_mask=True), dict(ours=5, theirs=3)),
    "options": (dict(pool=[3, 2], reduction=[1, 2], temperature=2.0), {}),
    "not divisible": (dict(pool=[4, 3]), dict(padded=(40, 72))),
    "one position of one image": (
        dict(strides=[128]),
        dict(strides=(128,), padded=(9, 9), images=1),
    ),
}


@harness.every_case(FKD, CASES)
def test_value(options, given):
    harness.check_value(kd(**options), by_hand, **given)


def test_at_the_start_the_blocks_are_the_identity():
    x = torch.randn(2, 4, 6, 5)
    assert torch.equal(NonLocal(4, 2, 2)(x), x)


@pytest.mark.parametrize("options", [{}, dict(channel_mask=True)])
def test_gradients(options):
    # The masks have no gradient, so gradcheck needs them constant: a high temperature.
    student, teacher = pair((16,), ours=2, theirs=3, padded=(48, 64))
    loss = harness.awake(harness.bound(kd(temperature=1e12, pool=[2], **options), student, teacher))
    harness.check_gradients(loss, student, teacher)


def test_the_mask_has_no_gradient():
    student, teacher = pair((8,))
    loss = harness.bound(kd(channel=0, spatial=0, nonlocal_=0), student, teacher)
    got = harness.check_who_learns(loss, student, teacher)["fpn", 8]
    s, t = student["fpn"][8], teacher["fpn"][8]
    mask = torch.tensor(
        np.stack(
            [
                (spatial_mask(a, 0.5) + spatial_mask(b, 0.5)) / 2
                for a, b in zip(s.numpy(), t.numpy())
            ]
        )
    ).unsqueeze(1)
    x = s.clone().requires_grad_()
    (0.7 * (mask * (t - loss.adapt["8"](x)) ** 2).sum().sqrt()).backward()
    assert torch.allclose(got, x.grad, atol=1e-12)


def test_where_nothing_differs_the_gradient_is_zero():
    student, teacher = pair((8,), 4, 4, fill=0.0)
    loss = harness.bound(kd(), student, teacher)
    for p in loss.parameters():
        p.data.zero_()
    gradients = harness.check_who_learns(loss, student, teacher)
    assert not gradients["fpn", 8].any()
