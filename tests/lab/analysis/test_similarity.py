"""MSE, cosine and CKA against plain numpy, and the invariances that CKA has."""

import numpy as np
import pytest
import torch

from sharedkd.lab.analysis.similarity import aligned, cka, gap, hsic, u_centred
from sharedkd.losses.alignment import Pooled


def song(x, y):
    """The unbiased estimator, term by term as Song et al. (2012) write it."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    for i in range(n):
        k[i, i] = m[i, i] = 0
    one = np.ones(n)
    total = np.trace(k @ m)
    total += (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    total -= 2 / (n - 2) * (one @ k @ m @ one)
    return total / (n * (n - 3))


def estimate(x, y):
    return hsic(u_centred(torch.from_numpy(x)), u_centred(torch.from_numpy(y)))


def cka_of(*minibatches):
    a, b = zip(*minibatches)
    return cka(
        [estimate(x, y) for x, y in minibatches],
        [estimate(x, x) for x in a],
        [estimate(y, y) for y in b],
    )


def examples(n, *widths, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.normal(3, 2, (n, width)) for width in widths]


@pytest.mark.parametrize("n", [4, 5, 40])
def test_hsic_is_the_published_estimator(n):
    x, y = examples(n, 3, 7)
    y[:, :3] += x
    assert estimate(x, y) == pytest.approx(song(x.copy(), y.copy()), rel=1e-9)


def test_cka_of_equal_and_of_unrelated_maps():
    x, y = examples(400, 6, 9)
    assert cka_of((x, x)) == pytest.approx(1)
    assert abs(cka_of((x, y))) < 0.05
    x[:, :] = 7.0
    assert np.isnan(cka_of((x, y)))


def test_cka_knows_no_rotation_scale_or_shift():
    x, y = examples(50, 6, 4)
    y += x[:, :4]
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    before = cka_of((x, y))
    assert 0.2 < before < 0.95
    assert cka_of((x @ rotation, y)) == pytest.approx(before)
    assert cka_of((x * -0.01 + 5, y)) == pytest.approx(before)
    # But one of the channels may not be scaled alone.
    assert cka_of((x * [10, 1, 1, 1, 1, 1], y)) != pytest.approx(before, rel=0.01)


def test_cka_is_a_ratio_of_means_over_minibatches():
    first, second = examples(20, 3, 3), examples(20, 3, 3, seed=1)
    second[0] *= 3
    batches = [first, second]
    xy, xx, yy = (
        np.mean([song(b[i].copy(), b[j].copy()) for b in batches])
        for i, j in ((0, 1), (0, 0), (1, 1))
    )
    assert cka_of(*batches) == pytest.approx(xy / np.sqrt(xx * yy))


def test_three_examples_are_too_few():
    (x,) = examples(3, 2)
    assert np.isnan(estimate(x, x))


def maps(channels, size, seed):
    return np.random.default_rng(seed).normal(1, 2, (1, channels, *size))


def pooled(x, times):
    n, c, h, w = x.shape
    return x.reshape(n, c, h // times, times, w // times, times).mean((3, 5))


def measure(x, y, normalize="instance", mask=None):
    mask = None if mask is None else torch.from_numpy(mask)[None, None]
    return aligned(Pooled(torch.from_numpy(x)), Pooled(torch.from_numpy(y)), normalize, mask)


@pytest.mark.parametrize("masked", [False, True])
def test_mse_and_cosine_of_maps_of_two_sizes_and_widths(masked):
    x, y = maps(3, (8, 12), 0), maps(5, (4, 6), 1)
    mask = np.ones((4, 6), bool)
    if masked:
        mask[3], mask[:, 4:] = False, False
    a, b = (z[0][:, mask] for z in (pooled(x, 2), y[:, :3]))  # (3, positions)
    found = measure(x, y, mask=mask if masked else None)
    cosine = (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
    assert found["cosine"] == pytest.approx(cosine.mean())
    a, b = ((z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True) for z in (a, b))
    assert found["mse"] == pytest.approx(((a - b) ** 2).mean(), rel=1e-5)


def test_equal_maps_have_no_gap():
    x = maps(4, (4, 4), 0)
    for name, value in measure(x, x).items():
        assert gap(name, value) == pytest.approx(0, abs=1e-9)
    assert measure(x, -x) == pytest.approx({"mse": 4, "cosine": -1}, rel=1e-5)
