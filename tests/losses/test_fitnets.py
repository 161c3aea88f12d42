"""FitNets: values by loops, with every adapter, and what padding does."""

import numpy as np
import pytest
from losses.harness import batch, bound, convolved, numbers, on_image, pair, same

from sharedkd.losses.fitnets import FitNets

SIZES = [(64, 96), (40, 33)]  # of two images on a canvas of 64 x 96 pixels


def reference(loss, student, teacher, sizes):
    """The mean of squared differences at all positions of all images."""
    found = {}
    for stride, maps in student["fpn"].items():
        each = []
        for s, t, size in zip(maps.numpy(), teacher["fpn"][stride].numpy(), sizes):
            s = convolved(numbers(loss.adapters[str(stride)]), "", s)
            each.append(on_image((s - t) ** 2, size, stride).ravel())
        found[f"s{stride}"] = np.concatenate(each).mean()
    return found


CASES = {
    "no adapter": (0, dict(strides=(16, 32))),
    "equal widths": (None, dict(strides=(32,))),
    "other widths": (None, dict(strides=(32,), ours=2, images=1)),
    "1x1": (1, dict(strides=(32,))),
    "3x3": (3, dict(strides=(16, 32), ours=2)),
    "one pixel": (3, dict(strides=(128,), images=1)),
}


@pytest.mark.parametrize("adapter, case", CASES.values(), ids=CASES)
def test_value(adapter, case):
    student, teacher = pair(**case)
    loss = bound(FitNets(adapter=adapter), student, teacher)
    expected = reference(loss, student, teacher, [(128, 128)] * 2)
    same(loss(batch(student, teacher)), expected)


@pytest.mark.parametrize("ignore", [True, False])
def test_padding_counts_unless_ignored(ignore):
    student, teacher = pair((16,))
    loss = bound(FitNets(adapter=3, ignore_padding=ignore), student, teacher)
    expected = reference(loss, student, teacher, SIZES if ignore else [(64, 96)] * 2)
    same(loss(batch(student, teacher, sizes=SIZES)), expected)
