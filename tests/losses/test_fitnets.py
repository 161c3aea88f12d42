"""FitNets: values by loops, with every adapter, and what padding does."""

import numpy as np
from losses.harness import PADDED, check_value, convolved, every_case, numbers, on_image

from sharedkd.losses.fitnets import FitNets


def by_hand(loss, student, teacher, boxes, sizes):
    """The mean of squared differences at all positions of all images."""
    found = {}
    for stride, maps in student["fpn"].items():
        each = []
        for s, t, size in zip(maps, teacher["fpn"][stride], sizes):
            s = convolved(numbers(loss.adapters[str(stride)]), "", s)
            each.append(on_image((s - t) ** 2, size, stride).ravel())
        found[f"s{stride}"] = np.concatenate(each).mean()
    return found


CASES = {
    "no adapter": (dict(adapter=0), {}),
    "only where widths differ": (dict(adapter=None), dict(ours={8: 2, 16: 3})),
    "1x1": (dict(adapter=1), {}),
    "3x3, padding ignored": (dict(adapter=3, ignore_padding=True), PADDED),
    "3x3, other widths": (dict(adapter=3), dict(ours=2)),
    "3x3, one position": (dict(adapter=3), dict(strides=(128,), images=1)),
}


@every_case(FitNets, CASES)
def test_value(options, given):
    check_value(FitNets(**options), by_hand, **given)
