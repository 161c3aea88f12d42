"""MGD: masked generation against loops."""

import numpy as np
import torch
from losses import harness
from losses.harness import convolved, numbers, on_image

from sharedkd.losses.mgd import MGD

ALPHA = 0.3


def kd(**options):
    return MGD(**{"alpha": ALPHA, "masked": 0.4, **options})


def by_hand(loss, student, teacher, boxes, sizes):
    expected = {}
    for stride in loss.strides:
        adapt, generate = (numbers(m[str(stride)]) for m in (loss.adapt, loss.generate))
        s, t = (x["fpn"][stride] for x in (student, teacher))
        images, _, height, width = s.shape
        draw = torch.rand(images, 1, height, width).numpy()
        total = 0.0
        for i, size in enumerate(sizes):
            shown = on_image(draw[i] >= loss.masked, size, stride)
            kept = convolved(adapt, "", s[i])
            kept = kept * np.pad(
                shown, [(0, a - b) for a, b in zip((1, height, width), shown.shape)]
            )
            made = convolved(generate, "2", np.maximum(convolved(generate, "0", kept), 0))
            total += on_image((t[i] - made) ** 2, size, stride).sum()
        expected[f"s{stride}"] = ALPHA * total / images
    return expected


CASES = {
    "other draws": ({}, dict(seed=1)),
    "nothing masked": (dict(masked=0), {}),
    "all masked": (dict(masked=1), {}),
}


@harness.every_case(MGD, CASES)
def test_value(options, given):
    harness.check_value(kd(**options), by_hand, **given)
