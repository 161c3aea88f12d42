"""Cosine: one minus the cosine at each position on an image, of the projected student's map."""

import numpy as np
from losses.harness import batch, bound, check_who_learns, convolved, numbers, pair, same

from sharedkd.losses import Cosine

SIZES = [(40, 90), (64, 96)]  # the first image ends within the padding


def test_value_and_padding():
    student, teacher = pair(ours=2, theirs=4)
    loss = bound(Cosine(), student, teacher)
    expected = {}
    for stride in (8, 16):
        each = []
        for s, t, (height, width) in zip(student["fpn"][stride], teacher["fpn"][stride], SIZES):
            s, t = convolved(numbers(loss), f"adapters.{stride}", s.numpy()), t.numpy()
            for y, x in np.ndindex(*t.shape[1:]):
                if y * stride < height and x * stride < width:
                    a, b = s[:, y, x], t[:, y, x]
                    each.append(1 - a @ b / np.sqrt((a @ a) * (b @ b)))
        expected[f"s{stride}"] = np.mean(each)
    same(loss(batch(student, teacher, sizes=SIZES)), expected, rel=1e-5)
    found = check_who_learns(loss, student, teacher, sizes=SIZES)
    assert found["fpn", 8][0, :, :5].any() and not found["fpn", 8][0, :, 5:].any()
