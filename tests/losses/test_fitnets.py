"""FitNets: values by loops, with every adapter, and what padding does."""

import pytest
from losses.harness import batch, bound, maps

from sharedkd.losses.fitnets import FitNets

SIZES = [(64, 96), (40, 33)]  # of two images on a canvas of 64 x 96 pixels


def reference(s, t, stride, conv=None, sizes=None):
    """The mean of squared differences, position by position; ``conv``: weight and bias."""
    total, count = 0.0, 0
    n, _, height, width = s.shape
    for i in range(n):
        for y in range(height):
            for x in range(width):
                if sizes and (y * stride >= sizes[i][0] or x * stride >= sizes[i][1]):
                    continue
                for c in range(t.shape[1]):
                    if conv is None:
                        value = s[i, c, y, x].item()
                    else:
                        weight, value = conv[0], conv[1][c].item()
                        half = weight.shape[-1] // 2
                        for k in range(s.shape[1]):
                            for dy in range(-half, half + 1):
                                for dx in range(-half, half + 1):
                                    if 0 <= y + dy < height and 0 <= x + dx < width:
                                        value += (
                                            weight[c, k, dy + half, dx + half]
                                            * s[i, k, y + dy, x + dx]
                                        ).item()
                    total += (value - t[i, c, y, x].item()) ** 2
                    count += 1
    return total / count


CASES = {
    "no adapter": (0, (3, 3), dict(strides=(16, 32))),
    "equal widths": (None, (3, 3), dict(strides=(32,))),
    "other widths": (None, (2, 3), dict(strides=(32,), images=1)),
    "1x1": (1, (3, 3), dict(strides=(32,))),
    "3x3": (3, (2, 3), dict(strides=(16, 32))),
    "one pixel": (3, (3, 3), dict(strides=(128,), images=1)),
    "constant": (3, (2, 3), dict(strides=(32,), fill=-3.0)),
}


@pytest.mark.parametrize("adapter, widths, case", CASES.values(), ids=CASES)
def test_value(adapter, widths, case):
    student = {"fpn": maps(channels=widths[0], **case)}
    teacher = {"fpn": maps(channels=widths[1], seed=1, **{**case, "fill": None})}
    loss = bound(FitNets(adapter=adapter), student, teacher)
    terms = loss(batch(student, teacher))
    assert list(terms) == [f"s{stride}" for stride in case["strides"]]
    for stride, s in student["fpn"].items():
        module = loss.adapters[str(stride)]
        conv = (module.weight, module.bias) if list(module.parameters()) else None
        expected = reference(s, teacher["fpn"][stride], stride, conv)
        assert terms[f"s{stride}"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("adapter", [0, 3])
def test_padding_counts_unless_ignored(adapter):
    student, teacher = {"fpn": maps((16,), 2)}, {"fpn": maps((16,), 2, seed=1)}
    for ignore in (False, True):
        loss = bound(FitNets(adapter=adapter, ignore_padding=ignore), student, teacher)
        term = loss(batch(student, teacher, sizes=SIZES))["s16"].item()
        conv = loss.adapters["16"]
        conv = (conv.weight, conv.bias) if adapter else None
        expected = reference(
            student["fpn"][16], teacher["fpn"][16], 16, conv, SIZES if ignore else None
        )
        assert term == pytest.approx(expected, rel=1e-9)
