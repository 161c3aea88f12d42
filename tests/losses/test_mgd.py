"""MGD: masked generation against loops, the mask's distribution, and what padding does."""

import math

import numpy as np
import pytest
import torch
from losses import harness

from sharedkd.losses.mgd import MGD

ALPHA = 0.3


def kd(**options):
    return MGD(**{"alpha": ALPHA, "masked": 0.4, **options})


def pair(strides=(16, 32), ours=3, theirs=3, **options):
    student = {"fpn": harness.maps(strides, ours, seed=1, **options)}
    return student, {"fpn": harness.maps(strides, theirs, seed=2, **options)}


# --- reference: python loops over numpy arrays ---------------------------------------------------


def conv(p, name, x):
    """3x3 with zeros around, one image (C, H, W)."""
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    height, width = x.shape[1:]
    around = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(weight), height, width))
    for o in range(len(weight)):
        for r in range(height):
            for c in range(width):
                out[o, r, c] = (weight[o] * around[:, r : r + 3, c : c + 3]).sum() + bias[o]
    return out


def by_hand(loss, student, teacher, sizes, seed):
    torch.manual_seed(seed)
    expected = {}
    for stride in loss.strides:
        adapt, generate = (
            {k: p.detach().double().numpy() for k, p in m[str(stride)].named_parameters()}
            for m in (loss.adapt, loss.generate)
        )
        s, t = (x["fpn"][stride].double().numpy() for x in (student, teacher))
        images, _, height, width = s.shape
        draw = torch.rand(images, 1, height, width).numpy()
        total = 0.0
        for i in range(images):
            a = s[i]
            if adapt:
                weight = adapt["weight"][:, :, 0, 0]
                a = np.einsum("oi,ihw->ohw", weight, a) + adapt["bias"][:, None, None]
            real = (height, width)
            if loss.ignore_padding:
                real = [math.ceil(n / stride) for n in sizes[i]]
            kept = np.zeros_like(a)
            for r in range(height):
                for c in range(width):
                    if draw[i, 0, r, c] >= loss.masked and r < real[0] and c < real[1]:
                        kept[:, r, c] = a[:, r, c]
            made = conv(generate, "2", np.maximum(conv(generate, "0", kept), 0))
            for r in range(min(real[0], height)):
                for c in range(min(real[1], width)):
                    total += ((t[i][:, r, c] - made[:, r, c]) ** 2).sum()
        expected[f"s{stride}"] = ALPHA * total / images
    return expected


CASES = {
    "plain": ({}, {}, {}, {}),
    "one image": ({}, {}, dict(images=1), {}),
    "wider teacher": ({}, dict(ours=2, theirs=4), {}, {}),
    "narrower teacher": ({}, dict(ours=4, theirs=1), {}, {}),
    "nothing masked": (dict(masked=0), {}, {}, {}),
    "all masked": (dict(masked=1), {}, {}, {}),
    "one pixel": (dict(strides=[128]), dict(strides=(128,)), {}, {}),
    "zeros": ({}, {}, dict(fill=0.0), {}),
    "constant": ({}, {}, dict(fill=-2.5), {}),
    "padding counts": ({}, {}, {}, dict(sizes=[(64, 96), (41, 50)])),
    "ignored": (dict(ignore_padding=True), {}, {}, dict(sizes=[(64, 96), (41, 50)])),
}


@pytest.mark.parametrize("options, widths, given, more", CASES.values(), ids=CASES)
def test_value(options, widths, given, more):
    student, teacher = pair(**widths, **given)
    loss = harness.bound(kd(**options), student, teacher)
    images = given.get("images", 2)
    for seed in (0, 1):
        torch.manual_seed(seed)
        terms = loss(harness.batch(student, teacher, **more))
        expected = by_hand(loss, student, teacher, more.get("sizes", [(64, 96)] * images), seed)
        assert list(terms) == list(expected)
        for name, value in expected.items():
            assert terms[name].item() == pytest.approx(value, rel=1e-9, abs=1e-12), name
