"""SemCKD: regressors, attention and pooling against loops; an image's loss is its own."""

import math

import numpy as np
import pytest
import torch
from losses import harness

from sharedkd.errors import ConfigError
from sharedkd.losses.semckd import SemCKD

STRIDES = (16, 32, 64)


def pair(strides=STRIDES, ours=3, theirs=3, **options):
    student = {"fpn": harness.maps(strides, ours, seed=1, **options)}
    return student, {"fpn": harness.maps(strides, theirs, seed=2, **options)}


def kd(**options):
    return SemCKD(**{"hidden": 4, "grid": 2, **options})


# --- reference: python loops over numpy arrays ---------------------------------------------------


def numbers(module):
    return {k: p.detach().double().numpy() for k, p in module.named_parameters()}


def pooled(x, size, ratio):
    """(C, H, W) to the coarser size: means of blocks that start at the top left, cut at the end."""
    out = np.zeros((len(x), *size))
    for r in range(size[0]):
        for c in range(size[1]):
            block = x[:, r * ratio : (r + 1) * ratio, c * ratio : (c + 1) * ratio]
            out[:, r, c] = block.mean((1, 2))
    return out


def regress(p, x):
    hidden = len(p["enter.bias"])
    first = np.einsum("oi,ihw->ohw", p["enter.weight"][:, :, 0, 0], x)
    first = np.maximum(first + p["enter.bias"][:, None, None], 0)
    around = np.pad(first, ((0, 0), (1, 1), (1, 1)))
    second = np.zeros_like(first)
    for o in range(hidden):
        for r in range(x.shape[1]):
            for c in range(x.shape[2]):
                window = around[:, r : r + 3, c : c + 3]
                second[o, r, c] = (p["mix.weight"][o] * window).sum() + p["mix.bias"][o]
    out = np.einsum("oi,ihw->ohw", p["leave.weight"][:, :, 0, 0], np.maximum(second, 0))
    return out + p["leave.bias"][:, None, None]


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


def by_hand(loss, student, teacher, sizes=None):
    n, first = len(loss.strides), student[loss.tap][loss.strides[0]]
    terms = {}
    for i in loss.strides:
        value = 0.0
        for b in range(len(first)):
            s, t = {}, {}
            for k in loss.strides:
                for maps, out in ((student, s), (teacher, t)):
                    x = maps[loss.tap][k][b].double().numpy()
                    if sizes is not None and loss.ignore_padding:  # the image as if never padded
                        h, w = sizes[b]
                        x = x[:, : math.ceil(h / k), : math.ceil(w / k)]
                    out[k] = x
            q = embedded(numbers(loss.queries[str(i)]), described(s[i], loss.grid))
            energy = [
                (q * embedded(numbers(loss.keys[str(j)]), described(t[j], loss.grid))).sum()
                / loss.temperature
                for j in loss.strides
            ]
            for j, e in zip(loss.strides, energy):
                share = math.exp(e) / sum(math.exp(x) for x in energy)
                size = s[max(i, j)].shape[1:]
                x = pooled(s[i], size, max(1, j // i))
                y = pooled(t[j], size, max(1, i // j))
                out = regress(numbers(loss.regressors[f"{i}_{j}"]), x)
                value += share * ((out - y) ** 2).mean()
        terms[f"s{i}"] = value / len(first) / n
    return terms


def check(loss, student, teacher, sizes=None, padded=(64, 96), rel=1e-9):
    harness.bound(loss, student, teacher)
    terms = loss(harness.batch(student, teacher, sizes=sizes, padded=padded))
    expected = by_hand(loss, student, teacher, sizes)
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=rel, abs=1e-12), name
    return terms


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, maps",
    [
        ({}, {}),
        ({"hidden": None, "grid": 3, "temperature": 0.2}, {}),
        ({}, {"ours": {16: 2, 32: 3, 64: 4}, "theirs": {16: 5, 32: 2, 64: 3}}),
        ({}, {"images": 1, "padded": (100, 72)}),  # no size divides another
        ({"strides": [32]}, {}),
        ({"strides": [64, 16]}, {}),
    ],
)
def test_value(options, maps):
    student, teacher = pair(**maps)
    check(kd(**options), student, teacher, padded=maps.get("padded", (64, 96)))


def test_value_on_the_backbone():
    student, teacher = ({"backbone": x["fpn"]} for x in pair())
    check(kd(tap="backbone"), student, teacher)


@pytest.mark.parametrize("ignore", [True, False])
def test_value_with_padding(ignore):
    student, teacher = pair()
    check(kd(ignore_padding=ignore), student, teacher, sizes=[(64, 40), (33, 96)])


@pytest.mark.parametrize("fill", [0.0, 2.5])
def test_constant_maps(fill):
    student, teacher = pair(fill=fill)
    loss = kd()
    check(loss, student, teacher)
    for g in harness.check_who_learns(loss, student, teacher).values():
        assert g.abs().max() < 1e3


def test_one_pixel_levels():
    student, teacher = pair(padded=(16, 16))
    assert all(x.shape[-2:] == (1, 1) for x in student["fpn"].values())
    check(kd(), student, teacher, padded=(16, 16))


def test_attention_prefers_the_level_that_its_key_points_to():
    student, teacher = pair()
    loss = harness.bound(kd(temperature=1e-3), student, teacher)
    with torch.no_grad():  # q and k no longer depend on maps: only k of stride 32 points to q
        for mlp in (*loss.queries.values(), *loss.keys.values()):
            mlp[2].weight.zero_()
            mlp[2].bias.copy_(torch.tensor([-1.0, 0, 0, 0]))
        for mlp in (*loss.queries.values(), loss.keys["32"]):
            mlp[2].bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        for regressor in loss.regressors.values():
            regressor.leave.weight.zero_(), regressor.leave.bias.zero_()
    terms = loss(harness.batch(student, teacher))
    for i in (32, 64):
        target = teacher["fpn"][32]
        target = target if i == 32 else torch.nn.functional.avg_pool2d(target, 2, ceil_mode=True)
        assert terms[f"s{i}"].item() == pytest.approx(target.square().mean().item() / 3, rel=1e-9)


# --- an image's loss is its own ------------------------------------------------------------------


def test_a_batchs_loss_is_the_mean_of_its_images():
    sizes = [(64, 40), (33, 96), (64, 96)]
    student, teacher = pair(images=3)
    loss = harness.bound(kd(), student, teacher)
    whole = loss(harness.batch(student, teacher, sizes=sizes))

    def alone(b):
        s, t = ({"fpn": {k: v[b : b + 1] for k, v in x["fpn"].items()}} for x in (student, teacher))
        return loss(harness.batch(s, t, sizes=sizes[b : b + 1]))

    singles = [alone(b) for b in range(3)]
    for name, value in whole.items():
        mean = sum(x[name].item() for x in singles) / 3
        assert value.item() == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("ignore", [True, False])
def test_padding(ignore):
    """Neither what stands on the padding nor how much of it there is counts."""
    size = (50, 70)
    student, teacher = pair(images=1, padded=size)
    loss = harness.bound(kd(ignore_padding=ignore), student, teacher)
    clean = loss(harness.batch(student, teacher, sizes=[size]))
    for padded in ((64, 96), (130, 75)):
        noisy = []
        for seed, levels in ((7, student), (8, teacher)):
            noise = harness.maps(STRIDES, 3, padded, 1, seed=seed)
            for stride, x in levels["fpn"].items():
                noise[stride] *= 20
                noise[stride][..., : x.shape[-2], : x.shape[-1]] = x
            noisy.append({"fpn": noise})
        other = loss(harness.batch(*noisy, sizes=[size]))
        same = [other[k].item() == pytest.approx(clean[k].item(), rel=1e-10) for k in clean]
        assert all(same) if ignore else not any(same)


# --- gradients, parameters, precision, options ---------------------------------------------------


def test_gradients():
    student, teacher = pair((32, 64), 2, 2, padded=(64, 64))
    loss = harness.bound(kd(hidden=3), student, teacher)
    harness.check_gradients(loss, student, teacher, sizes=[(64, 64), (33, 32)])
    harness.check_who_learns(loss, student, teacher, sizes=[(64, 64), (33, 32)])


def test_the_attention_has_a_share_in_the_gradient():
    student, teacher = pair()
    loss = harness.bound(kd(), student, teacher)
    harness.check_who_learns(loss, student, teacher)
    for mlp in (loss.queries, loss.keys):
        assert all(p.grad.abs().max() > 0 for p in mlp["16"].parameters())


@pytest.mark.parametrize("hidden, count", [(None, 65_979_520), (64, 2_161_920)])
def test_parameters_at_256_channels(hidden, count):
    widths = {"fpn": dict.fromkeys(harness.ONE_STAGE, 256)}
    with torch.device("meta"):
        loss = SemCKD(hidden=hidden)
        loss.bind(widths, widths, "key")
    assert harness.parameters(loss) == count


def test_parameters_at_other_widths():
    ours, theirs, d = {8: 3, 16: 5}, {8: 4, 16: 7}, 81
    loss = SemCKD(grid=3)
    loss.bind({"fpn": ours}, {"fpn": theirs}, "key")
    expected = 4 * ((d + 1) * (d // 2) + (d // 2 + 1) * (d // 4))
    for c in ours.values():
        for t in theirs.values():
            h = 2 * t
            expected += (c * h + h) + (9 * h * h + h) + (h * t + t)
    assert harness.parameters(loss) == expected


def test_precision():
    student, teacher = pair()
    exact = harness.bound(kd(), student, teacher)(harness.batch(student, teacher))
    for dtype, rel in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        low = [{"fpn": {k: v.to(dtype) for k, v in x["fpn"].items()}} for x in (student, teacher)]
        loss = harness.bound(kd(), student, teacher).float()
        for name, term in loss(harness.batch(*low)).items():
            assert term.dtype == torch.float32
            assert term.item() == pytest.approx(exact[name].item(), rel=rel)


@pytest.mark.parametrize(
    "options", [{"hidden": 0}, {"grid": 1}, {"temperature": 0.0}, {"tap": "neck"}]
)
def test_bad_options(options):
    key, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=f"^{key}={value}: "):
        SemCKD(**options)


def test_needs_a_teacher():
    with pytest.raises(ConfigError, match="^key=SemCKD: needs a teacher"):
        SemCKD().bind({"fpn": {8: 4}}, None, "key")
