"""MGD: masked generation against loops."""

import numpy as np
import pytest
import torch
from losses import harness
from losses.harness import convolved, numbers, on_image, pair

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
        for i, size in enumerate(sizes):
            real = size if loss.ignore_padding else (height * stride, width * stride)
            shown = on_image(draw[i] >= loss.masked, real, stride)
            kept = convolved(adapt, "", s[i])
            kept = kept * np.pad(
                shown, [(0, a - b) for a, b in zip((1, height, width), shown.shape)]
            )
            made = convolved(generate, "2", np.maximum(convolved(generate, "0", kept), 0))
            total += on_image((t[i] - made) ** 2, real, stride).sum()
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
