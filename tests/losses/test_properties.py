"""Whatever is asked for: a clear refusal, or finite losses with gradients where they belong."""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from losses import harness

from sharedkd import ConfigError, losses
from sharedkd.losses.alignment import align
from sharedkd.losses.distance import DISTANCES, NORMALIZATIONS


def examples(count):
    """The same ones in every run, and no database of them."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
        ],
    )


STRIDES = (4, 8, 16, 32, 64, 128)
WRONG = st.sampled_from([-1.0, float("nan"), float("inf"), -float("inf")])


def mostly(good, bad=WRONG):
    """Values that work, and now and then one that does not."""
    return st.integers(0, 39).flatmap(lambda n: bad if n == 20 else good)


def names(known):
    return mostly(st.sampled_from(sorted(known)), st.sampled_from(["", "nothing"]))


weights = mostly(st.sampled_from([0.5, 2.0, 0.0]))
temperatures = mostly(st.sampled_from([0.1, 1.0, 10.0]), st.sampled_from([0.0, -1.0, float("nan")]))
adapter = mostly(st.sampled_from([None, 1, 3]), st.sampled_from([0, 2, -1]))
sizes = mostly(st.integers(1, 8), st.sampled_from([0, -1]))
switch = st.booleans()
levels = mostly(
    st.one_of(st.none(), st.none(), st.lists(st.sampled_from(STRIDES), max_size=2)),
    st.sampled_from([[0], [-8], [4.5], "all", 8, ["8"], [True]]),
)
distances = dict(distance=names(DISTANCES), normalize=names(NORMALIZATIONS), ignore_padding=switch)

#: Loss -> what its options are drawn from, besides its strides.
OPTIONS = {
    losses.IdenticalLayer: dict(share=names(["dense", "adjacent", "none"]), **distances),
    losses.CrossLayer: dict(
        pairs=names(["dense", "adjacent"]),
        direction=names(["mutual"]),  # else one end learns nothing, see test_shared_kd.py
        **distances,
    ),
    losses.CWD: dict(temperature=temperatures, adapter=adapter, ignore_padding=switch),
    losses.DenseDKD: dict(
        alpha=weights, beta=weights, gamma=mostly(st.sampled_from([0.0, 1.0, 2.0]))
    ),
    losses.DKD: dict(alpha=weights, beta=weights, temperature=temperatures),
    losses.FeatureFusion: dict(fit=weights, feature=weights, response=weights, adapter=adapter),
    losses.FGD: dict(
        foreground=weights,
        background=weights,
        attention=weights,
        global_=weights,
        temperature=temperatures,
        ignore_padding=switch,
    ),
    losses.FitNets: dict(adapter=adapter, ignore_padding=switch),
    losses.FKD: dict(
        feature=weights,
        channel=weights,
        spatial=weights,
        nonlocal_=weights,
        temperature=temperatures,
        channel_mask=switch,
    ),
    losses.FRS: dict(feature=weights, response=weights, adapter=adapter),
    losses.GanKD: dict(discriminator=weights, hidden=sizes, layers=st.integers(1, 3)),
    losses.GID: dict(
        feature=weights,
        relation=weights,
        response_class=weights,
        response_box=weights,
        instances=sizes,
        candidates=mostly(st.sampled_from([1, 50]), st.just(0)),
        nms=mostly(st.just(0.3)),
        min_size=mostly(st.sampled_from([0.0, 10.0])),
        crop=sizes,
        match=mostly(st.just(0.5)),
        positions=names(["anchors", "boxes"]),
        beta=mostly(st.sampled_from([0.0, 0.1])),
        adapter=adapter,
    ),
    losses.ImprovedKD: dict(
        reach=mostly(st.integers(0, 2), st.just(-1)), samples=mostly(st.just(0.5))
    ),
    losses.MGD: dict(alpha=weights, masked=mostly(st.sampled_from([0.0, 0.5, 1.0]))),
    losses.PKD: dict(statistics=names(["batch", "image"]), adapter=adapter, ignore_padding=switch),
    losses.ReviewKD: dict(mid_channels=sizes),
    losses.SemCKD: dict(
        hidden=mostly(st.sampled_from([None, 4]), st.just(0)),
        grid=mostly(st.integers(2, 4), st.just(1)),
        temperature=temperatures,
    ),
}


@st.composite
def pyramids(draw, one_width=False):
    """(student's maps, teacher's maps, options of a batch): any levels, widths and sizes.

    Args:
        one_width: of all levels of a detector, as FPNs have it.
    """
    images, seed = draw(st.integers(1, 3)), draw(st.integers(0, 99))
    padded = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    found = []
    for who in range(2):
        strides = sorted(draw(st.sets(st.sampled_from(STRIDES), min_size=1, max_size=4)))
        widths = {s: draw(st.integers(1, 6)) for s in strides}
        if one_width:
            widths = dict.fromkeys(strides, widths[strides[0]])
        found.append(harness.detector(strides, widths, padded, images, seed + 10 * who))
    sizes = [tuple(draw(st.integers(1, side)) for side in padded) for _ in range(images)]
    boxes = [[(0, 0, w, h)] if draw(switch) else [] for h, w in sizes]
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(2, 4))
    batch = dict(padded=padded, sizes=sizes, boxes=boxes)
    return *found, {**batch, **harness.matched(found[0], rows, columns, seed)}


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_a_refusal_or_finite_losses_with_gradients(kind):
    seen = Counter()

    @examples(40)
    @given(data=st.data())
    def check(data):
        seen[_refused_or_finite(kind, data)] += 1

    check()
    assert seen["refused"] and seen["finite"] >= 4, seen


def _refused_or_finite(kind, data):
    # GID refuses levels of different widths, so that random ones would hardly ever be computed.
    one_width = kind is losses.GID and data.draw(st.integers(0, 9)) > 0
    student, teacher, batch = data.draw(pyramids(one_width=one_width))
    options = {name: data.draw(values, name) for name, values in OPTIONS[kind].items()}
    if kind is not losses.DKD:  # which reads no maps
        options["strides"] = data.draw(levels, "strides")
    try:
        loss = kind(**options)
        loss = harness.bound(loss, student, teacher if "teacher" in loss.needs else None)
    except ConfigError as e:
        assert "\n" not in str(e) and e.key and e.fix
        return "refused"
    parts = [options[name] for name, values in OPTIONS[kind].items() if values is weights]
    if parts and not any(parts):
        return "every term is switched off"
    torch.manual_seed(0)
    regions = batch["regions"].student.requires_grad_()
    gradients = harness.check_who_learns(loss, student, teacher, **batch)
    found = [regions.grad] if kind is losses.DKD else gradients.values()
    found = [g for g in found if g is not None]
    assert found and all(torch.isfinite(g).all() for g in found)
    return "finite"


sides = st.integers(1, 9)


@examples(40)
@given(st.tuples(sides, sides, sides), st.tuples(sides, sides, sides), st.integers(0, 9))
def test_alignment_keeps_means_and_meets_in_the_smaller(ours, theirs, seed):
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(1, *shape, generator=draw, dtype=torch.float64) for shape in (ours, theirs))
    a, b = align(x, y)
    smaller = tuple(map(min, ours, theirs))
    assert a.shape == b.shape == (1, *smaller)
    for before, after in ((x, a), (y, b)):
        inside = before[:, : smaller[0]]
        assert inside.min() - 1e-9 <= after.min() and after.max() <= inside.max() + 1e-9
        if before.shape[-2] % smaller[1] == 0 and before.shape[-1] % smaller[2] == 0:
            torch.testing.assert_close(after.mean(), inside.mean())
