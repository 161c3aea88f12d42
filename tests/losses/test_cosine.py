"""Cosine: one minus the cosine at each position on an image, of the projected student's map."""

import numpy as np
from losses.harness import batch, bound, check_who_learns, convolved, numbers, on_image, pair, same

from sharedkd.losses import Cosine

SIZES = [(40, 90), (64, 96)]  # the first image ends within the padding


def test_value_and_padding():
    student, teacher = pair(ours=2, theirs=4)
    loss = bound(Cosine(), student, teacher)
    expected = {}
    for stride in (8, 16):
        each = []
        for s, t, size in zip(student["fpn"][stride], teacher["fpn"][stride], SIZES):
            s = convolved(numbers(loss), f"adapters.{stride}", s.numpy())
            a, b = (on_image(x, size, stride) for x in (s, t.numpy()))
            cosines = (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))
            each.append(1 - cosines.ravel())
        expected[f"s{stride}"] = np.concatenate(each).mean()
    same(loss(batch(student, teacher, sizes=SIZES)), expected, rel=1e-5)
    found = check_who_learns(loss, student, teacher, sizes=SIZES)
    assert found["fpn", 8][0, :, :5].any() and not found["fpn", 8][0, :, 5:].any()
