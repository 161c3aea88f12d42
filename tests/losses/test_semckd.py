"""SemCKD: regressors, attention and pooling against loops."""

import math

import numpy as np
import pytest
from losses import harness
from losses.harness import convolved, numbers, on_image, pair, softmax

from sharedkd.losses.semckd import SemCKD

STRIDES = (16, 32, 64)


def kd(**options):
    return SemCKD(**{"hidden": 4, "grid": 2, **options})


def pooled(x, size, ratio):
    """(C, H, W) to the coarser size: means of blocks that start at the top left, cut at the end."""
    out = np.zeros((len(x), *size))
    for r in range(size[0]):
        for c in range(size[1]):
            block = x[:, r * ratio : (r + 1) * ratio, c * ratio : (c + 1) * ratio]
            out[:, r, c] = block.mean((1, 2))
    return out


def regress(p, x):
    for name in ("enter", "mix"):
        x = np.maximum(convolved(p, name, x), 0)
    return convolved(p, "leave", x)


def described(x, g, fine=24):
    """Cosines between cells, the map drawn on a fine grid on which each cell is whole."""
    height, width = x.shape[1:]
    assert fine % g == 0
    large = np.kron(x, np.ones((1, fine, fine)))  # each position is fine x fine small ones
    h, w = height * fine // g, width * fine // g
    cells = [
        large[:, r * h : (r + 1) * h, c * w : (c + 1) * w].mean((1, 2))
        for r in range(g)
        for c in range(g)
    ]
    cells = [v / math.sqrt((v * v).sum() + 1e-6) for v in cells]
    return np.array([(a * b).sum() for a in cells for b in cells])


def embedded(p, d):
    v = p["2.weight"] @ np.maximum(p["0.weight"] @ d + p["0.bias"], 0) + p["2.bias"]
    return v / math.sqrt((v * v).sum() + 1e-6)


def by_hand(loss, student, teacher, boxes, sizes):
    terms = {}
    for i in loss.strides:
        value = 0.0
        for b, size in enumerate(sizes):
            s, t = (  # the image as if never padded
                {k: on_image(x[loss.tap][k][b], size, k) for k in loss.strides}
                for x in (student, teacher)
            )
            q = embedded(numbers(loss.queries[str(i)]), described(s[i], loss.grid))
            energy = [
                (q * embedded(numbers(loss.keys[str(j)]), described(t[j], loss.grid))).sum()
                / loss.temperature
                for j in loss.strides
            ]
            for j, share in zip(loss.strides, softmax(np.array(energy))):
                size = s[max(i, j)].shape[1:]
                x = pooled(s[i], size, max(1, j // i))
                y = pooled(t[j], size, max(1, i // j))
                out = regress(numbers(loss.regressors[f"{i}_{j}"]), x)
                value += share * ((out - y) ** 2).mean()
        terms[f"s{i}"] = value / len(sizes) / len(loss.strides)
    return terms


CASES = {
    "levels that are apart": ({"strides": [64, 16]}, {}),
    "options": ({"hidden": None, "grid": 3, "temperature": 0.2}, {}),
    "no size divides another": ({}, {"images": 1, "padded": (100, 72)}),
    "backbone": ({"tap": "backbone"}, {}),
}


@harness.every_case(SemCKD, CASES)
def test_value(options, given):
    harness.check_value(kd(**options), by_hand, **{"strides": STRIDES, **given})


@pytest.mark.parametrize("fill", [0.0, 2.5])
def test_gradients_of_constant_maps_are_small(fill):
    student, teacher = pair(STRIDES, fill=fill)
    loss = harness.bound(kd(), student, teacher)
    for g in harness.check_who_learns(loss, student, teacher).values():
        assert g.abs().max() < 1e3
