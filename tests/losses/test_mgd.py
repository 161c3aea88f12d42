"""MGD: masked generation against loops, the mask's distribution, and what padding does."""

import math

import numpy as np
import pytest
import torch
from losses import harness

from sharedkd.errors import ConfigError
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


class Seen(torch.nn.Module):
    """In place of the generator: keeps what it is given."""

    def forward(self, x):
        self.x = x
        return x


def what_is_kept(masked, padded=(64, 96), images=2, sizes=None, **options):
    ones = {"fpn": harness.maps((2,), 3, padded=padded, images=images, fill=1.0)}
    loss = harness.bound(kd(masked=masked, **options), ones, ones)
    loss.generate["2"] = Seen()
    loss(harness.batch(ones, ones, padded=padded, sizes=sizes))
    return loss.generate["2"].x


@pytest.mark.parametrize("masked", [0.0, 0.45, 0.65, 1.0])
def test_mask(masked):
    kept = what_is_kept(masked)
    assert torch.equal(kept, kept[:, :1].expand_as(kept))  # one mask for all channels
    assert ((kept == 0) | (kept == 1)).all()
    assert 1 - kept.mean().item() == pytest.approx(masked, abs=0.04)
    if 0 < masked < 1:
        assert not torch.equal(kept[0], kept[1])  # another one per image


def test_padding_is_masked_when_ignored():
    kept = what_is_kept(0.0, sizes=[(64, 96), (31, 40)], ignore_padding=True)
    assert kept[0].all() and kept[1, :, :16, :20].all() and kept[1].sum() == 3 * 16 * 20


def test_the_seed_decides_and_each_step_draws_anew():
    student, teacher = pair()
    loss = harness.bound(kd(), student, teacher)

    def step():
        return [v.item() for v in loss(harness.batch(student, teacher)).values()]

    torch.manual_seed(5)
    first, second = step(), step()
    torch.manual_seed(5)
    assert step() == first != second


@pytest.mark.parametrize("ours", [2, 3])
@pytest.mark.parametrize("ignore", [False, True])
def test_gradients(ours, ignore):
    student, teacher = pair((16,), ours=ours, padded=(48, 64))
    loss = harness.bound(kd(ignore_padding=ignore), student, teacher)
    more = dict(sizes=[(48, 64), (30, 20)], padded=(48, 64))
    harness.check_gradients(loss, student, teacher, **more)


@pytest.mark.parametrize("masked", [0.4, 1.0])
@pytest.mark.parametrize("fill", [None, 0.0, 1.5])
@pytest.mark.parametrize("ours", [2, 3])
def test_who_learns(ours, fill, masked):
    student, teacher = pair(ours=ours, fill=fill)
    loss = harness.bound(kd(masked=masked), student, teacher)
    gradients = harness.check_who_learns(loss, student, teacher)
    if fill is None:
        assert all(g.any() == (masked < 1) for g in gradients.values())


@pytest.mark.parametrize("ignore", [False, True])
def test_padding_counts_unless_ignored(ignore):
    student, teacher = pair()
    noisy = [{"fpn": {k: x.clone() for k, x in y["fpn"].items()}} for y in (student, teacher)]
    for levels in noisy:
        for stride, x in levels["fpn"].items():
            x[1, :, -(-33 // stride) :] = 30.0
            x[1, :, :, -(-64 // stride) :] = -30.0
    loss = harness.bound(kd(ignore_padding=ignore), student, teacher)
    results = []
    for maps in ((student, teacher), noisy):
        torch.manual_seed(0)
        results.append(loss(harness.batch(*maps, sizes=[(64, 96), (33, 64)])))
    for name, value in results[0].items():
        same = results[1][name].item() == pytest.approx(value.item(), rel=1e-9)
        assert same is ignore


def test_precision():
    student, teacher = pair(dtype=torch.float64)
    loss = harness.bound(kd(), student, teacher)
    torch.manual_seed(0)
    expected = loss(harness.batch(student, teacher))
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = pair(dtype=dtype)
        loss = harness.bound(kd(), student, teacher).float()
        torch.manual_seed(0)
        for name, value in loss(harness.batch(ours, theirs)).items():
            assert value.dtype == torch.float32 and torch.isfinite(value)
            if dtype == torch.float32:
                assert value.item() == pytest.approx(expected[name].item(), rel=1e-4)


@pytest.mark.parametrize("s, t", [(256, 256), (24, 40)])
def test_number_of_parameters(s, t):
    loss = kd()
    loss.bind({"fpn": {8: s}}, {"fpn": {8: t}}, "key")
    expected = 18 * t * t + 2 * t + (s * t + t if s != t else 0)
    assert harness.parameters(loss) == expected
    if t == 256:
        assert expected == 1180160


@pytest.mark.parametrize(
    "options, start",
    [
        (dict(alpha=-1), "alpha=-1:"),
        (dict(alpha=float("nan")), "alpha=nan:"),
        (dict(masked=1.5), "masked=1.5:"),
        (dict(masked=-0.1), "masked=-0.1:"),
        (dict(tap="neck"), "tap=neck:"),
    ],
)
def test_bad_options(options, start):
    with pytest.raises(ConfigError) as error:
        kd(**options)
    assert str(error.value).startswith(start)


def test_bind_needs_a_teacher():
    with pytest.raises(ConfigError, match="^key=MGD:"):
        kd().bind({"fpn": {8: 4}}, None, "key")


def test_alpha_and_share_are_required():
    for given in (dict(alpha=1.0), dict(masked=0.5)):
        with pytest.raises(TypeError):
            MGD(**given)
