"""MGD: masked generation against loops."""

import math

import numpy as np
import pytest
import torch
from losses import harness
from losses.harness import convolved, numbers, pair

from sharedkd.losses.mgd import MGD

ALPHA = 0.3


def kd(**options):
    return MGD(**{"alpha": ALPHA, "masked": 0.4, **options})


def by_hand(loss, student, teacher, sizes, seed):
    torch.manual_seed(seed)
    expected = {}
    for stride in loss.strides:
        adapt, generate = (numbers(m[str(stride)]) for m in (loss.adapt, loss.generate))
        s, t = (x["fpn"][stride].double().numpy() for x in (student, teacher))
        images, _, height, width = s.shape
        draw = torch.rand(images, 1, height, width).numpy()
        total = 0.0
        for i in range(images):
            a = convolved(adapt, "", s[i])
            real = (height, width)
            if loss.ignore_padding:
                real = [math.ceil(n / stride) for n in sizes[i]]
            kept = np.zeros_like(a)
            for r in range(height):
                for c in range(width):
                    if draw[i, 0, r, c] >= loss.masked and r < real[0] and c < real[1]:
                        kept[:, r, c] = a[:, r, c]
            made = convolved(generate, "2", np.maximum(convolved(generate, "0", kept), 0))
            for r in range(min(real[0], height)):
                for c in range(min(real[1], width)):
                    total += ((t[i][:, r, c] - made[:, r, c]) ** 2).sum()
        expected[f"s{stride}"] = ALPHA * total / images
    return expected


CASES = {
    "plain": ({}, {}, {}, {}),
    "wider teacher": ({}, dict(ours=2, theirs=4), dict(images=1), {}),
    "nothing masked": (dict(masked=0), {}, {}, {}),
    "all masked": (dict(masked=1), {}, {}, {}),
    "padding counts": ({}, {}, {}, dict(sizes=[(64, 96), (41, 50)])),
    "ignored": (dict(ignore_padding=True), {}, {}, dict(sizes=[(64, 96), (41, 50)])),
}


@pytest.mark.parametrize("options, widths, given, more", CASES.values(), ids=CASES)
def test_value(options, widths, given, more):
    student, teacher = pair(**{"strides": (16, 32), **widths}, **given)
    loss = harness.bound(kd(**options), student, teacher)
    images = given.get("images", 2)
    for seed in (0, 1):
        torch.manual_seed(seed)
        terms = loss(harness.batch(student, teacher, **more))
        expected = by_hand(loss, student, teacher, more.get("sizes", [(64, 96)] * images), seed)
        harness.same(terms, expected)
