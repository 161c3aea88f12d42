"""All level pairs of a pair of pyramids, their summary, and what is said of it."""

import json

import numpy as np
import pytest
import torch

from sharedkd.lab.analysis.feature_plots import draw_heat_maps, draw_training
from sharedkd.lab.analysis.gap_report import words
from sharedkd.lab.analysis.gaps import GapMeter
from sharedkd.lab.analysis.similarity import MEASURES, aligned, cka, hsic, u_centred
from sharedkd.lab.scores import Difference
from sharedkd.losses.alignment import Pooled

SIZE = (32, 48)


def pyramid(channels, seed, size=SIZE):
    draw = torch.Generator().manual_seed(seed)
    return {
        s: torch.randn(1, c, size[0] // s, size[1] // s, generator=draw)
        for s, c in channels.items()
    }


def meter(images, size=SIZE, **options):
    found = GapMeter(**options)
    for student, teacher in images:
        found.add(student, teacher, size)
    return found.result()


def images(count, seed=0):
    return [
        (pyramid({4: 3, 8: 5}, seed + 2 * i), pyramid({4: 6, 8: 9}, seed + 2 * i + 1))
        for i in range(count)
    ]


def test_every_pair_is_measured_by_the_loss_s_own_distance():
    data = images(3)
    gaps = meter(data, normalize="channel")
    student, teacher = data[1]
    levels = {"student": student, "teacher": teacher}
    for i, (who, s) in enumerate(gaps.nodes):
        for j, (other, t) in enumerate(gaps.nodes):
            found = {name: gaps.values[name][1, i, j] for name in ("mse", "cosine")}
            direct = aligned(Pooled(levels[who][s]), Pooled(levels[other][t]), "channel")
            assert found == pytest.approx(direct, abs=1e-6)
    matrix = gaps.matrix("student-teacher", "mse")
    assert matrix["rows"] == matrix["columns"] == [4, 8]
    values = gaps.values["mse"][:, 0, 3]  # student 4, teacher 8
    assert matrix["mean"][0][1] == pytest.approx(values.mean())
    assert matrix["sd"][0][1] == pytest.approx(values.std(ddof=1))


def test_cka_takes_all_channels_and_the_same_positions_of_each_map():
    """With all positions as examples nothing is left to chance."""
    data = images(4)
    gaps = meter(data, minibatch=2, positions=10**6)
    assert gaps.values["cka"].shape == (2, 4, 4)
    rows = lambda x: x[0].flatten(1).T  # noqa: E731
    estimates = []
    for pairs in (data[:2], data[2:]):
        x = torch.cat([rows(torch.nn.functional.avg_pool2d(s[4], 2)) for s, _ in pairs])
        y = torch.cat([rows(t[8]) for _, t in pairs])
        a, b = u_centred(x), u_centred(y)
        estimates.append((hsic(a, b), hsic(a, a), hsic(b, b)))
    expected = cka(*zip(*estimates))
    assert gaps.matrix("student-teacher", "cka")["mean"][0][1] == pytest.approx(expected, rel=1e-4)
    assert np.diagonal(gaps.cka) == pytest.approx(1)


def test_equal_pyramids():
    data = [(pyramid({4: 6, 8: 6}, i),) * 2 for i in range(4)]
    gaps = meter(data, positions=8)
    assert gaps.quantity("identical", "mse") == pytest.approx(0, abs=1e-6)
    assert gaps.quantity("identical", "cka") == pytest.approx(0, abs=1e-6)
    for measure in MEASURES:  # then a student's own levels are the teacher's, too
        inner, cross = (gaps.quantity(q, measure) for q in ("inner", "cross"))
        assert inner == pytest.approx(cross, abs=1e-6)


def test_quantities_are_means_over_level_pairs():
    data = [(pyramid({4: 3, 8: 3, 16: 3}, 1), pyramid({8: 3, 16: 3, 32: 3}, 2, (64, 96)))]
    data[0][1].update({s: x[..., : 32 // s, : 48 // s] for s, x in data[0][1].items()})
    gaps = meter(data)
    at = {node: i for i, node in enumerate(gaps.nodes)}
    value = lambda a, b: gaps.values["mse"][0, at[a], at[b]]  # noqa: E731
    s8, s16, t8, t16 = (("student", 8), ("student", 16), ("teacher", 8), ("teacher", 16))
    assert gaps.level_pairs() == [(8, 16)]
    expected = {
        "identical": (value(s8, t8) + value(s16, t16)) / 2,
        "inner": value(s8, s16),
        "cross": (value(s8, t16) + value(s16, t8)) / 2,
        "teacher": value(t8, t16),
    }
    for name, mean in expected.items():
        assert gaps.quantity(name, "mse") == pytest.approx([mean])


def test_padding_is_left_out():
    data = images(1)
    changed = [tuple({s: x.clone() for s, x in p.items()} for p in data[0])]
    for levels in changed[0]:
        for stride, x in levels.items():
            x[..., 16 // stride :, :] = 99  # the image has 16 rows
    for name in ("mse", "cosine", "cka"):
        before, after = (meter(d, (16, 48)).values[name] for d in (data, changed))
        assert before == pytest.approx(after, abs=1e-5)
        assert not np.allclose(meter(changed).values[name], after, atol=1e-3)


@pytest.mark.parametrize(
    "ours, low, high, verdict",
    [  # t quantile of two degrees of freedom: 4.302653
        ([4, 5, 6], 5 - 2.484138, 5 + 2.484138, "larger"),
        ([-4, -5, -6], -5 - 2.484138, -5 + 2.484138, "smaller"),
        ([1, 2, 3], 2 - 2.484138, 2 + 2.484138, "no difference shown"),
        ([1, np.nan, np.nan], np.nan, np.nan, "one image: no interval"),
    ],
)
def test_nothing_is_claimed_where_the_interval_includes_zero(ours, low, high, verdict):
    found = Difference.of(ours, ("smaller", "larger", "image")).record()
    assert [found["low"], found["high"]] == pytest.approx([low, high], rel=1e-5, nan_ok=True)
    assert found["verdict"] == verdict


def record(gaps, names=("initial", "iteration 5")):
    state = {"file": None, "taps": {"fpn": gaps.record()}}
    return {
        "images": 4,
        "minibatch": 2,
        "positions": 8,
        "normalize": "instance",
        "channels": {"fpn": {"student": {4: 3, 8: 5}, "teacher": {4: 6, 8: 9}}},
        "initial_is_the_runs": True,
        "checkpoints": [{"name": n, "iteration": 5 * i, **state} for i, n in enumerate(names)],
        "command": "the command",
        "pictures": [],
    }


def test_the_first_sentence_counts_the_answers():
    found = json.loads(json.dumps(record(meter(images(4), minibatch=2))))
    for state, verdict in zip(found["checkpoints"], ("larger", "smaller")):
        for difference in state["taps"]["fpn"]["inner_minus_cross"].values():
            difference["verdict"] = verdict
    assert (
        "After training (iteration 5): **yes** in 3 of 3 measures. "
        "Before training (initial): **yes** in 0 of 3 measures, **no** in 3." in words(found)
    )


def test_other_initial_weights_are_told_with_the_verdict():
    found = {**record(meter(images(4), minibatch=2)), "initial_is_the_runs": False}
    assert "**The initial weights differ" in words(found).split("## The gaps")[0]


def test_words_and_figures():
    close = [(pyramid({4: 6, 8: 6}, i), pyramid({4: 6, 8: 6}, 50 + i)) for i in range(4)]
    for student, _ in close:
        student[8] = torch.nn.functional.avg_pool2d(student[4], 2)
    found = record(meter(close, minibatch=2))
    text = words(found)
    cells = [x.strip() for x in text.split("| FPN")[1].split("\n")[0].split("|")]
    assert cells[1:3] == ["MSE", "initial"] and cells[4].startswith("0.000 ±")
    inner, cross = (float(cells[i].split()[0]) for i in (4, 5))
    assert cells[-2] == "smaller" and cells[-3].endswith("]")
    assert float(cells[-3].split()[0]) == pytest.approx(inner - cross, abs=2e-3)
    noise = words(record(meter(images(2))))
    assert "no difference shown" in noise and "one value: no interval" in noise

    figure = draw_heat_maps(found, "fpn")
    titles = [axes.get_title() for axes in figure.axes[:5]]
    assert titles[0] == "teacher - teacher" and titles[4] == "student - student\niteration 5"
    inner = figure.axes[4].images[0].get_array()
    assert inner[0, 1] == pytest.approx(0, abs=1e-6)
    curves = draw_training(found, "fpn").axes[0].lines
    assert [line.get_label() for line in curves] == ["identical", "inner", "cross", "teacher"]
    assert list(curves[1].get_xdata()) == [0, 5]
    assert draw_training(record(meter(images(2)), names=("initial",)), "fpn") is None
