"""Whatever is asked for: a clear refusal, or finite losses with gradients where they belong."""

import math
from collections import Counter

import pytest
import tiny
import torch
from detectron2.utils.events import EventStorage
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from losses import harness
from omegaconf import OmegaConf

from sharedkd import ConfigError, FrozenTeacher, SharedKD, Stage, losses
from sharedkd.config.defaults import TRAIN_DEFAULTS, Train
from sharedkd.config.structure import settle
from sharedkd.errors import Findings
from sharedkd.losses.alignment import align
from sharedkd.losses.base import Regions
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
        direction=names(
            ["mutual"]
        ),  # else one end learns nothing, see tests/losses/test_shared_kd.py
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


ANCHORS = 2  # of a position, with two classes


@st.composite
def pyramids(draw, one_width=False):
    """(student's maps, teacher's maps, options of a batch): any levels, widths and sizes.

    Args:
        one_width: of all levels of a detector, as FPNs have it.
    """
    images, seed = draw(st.integers(1, 3)), draw(st.integers(0, 99))
    padded = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    found = []
    random = torch.Generator().manual_seed(seed)
    for who in range(2):
        strides = sorted(draw(st.sets(st.sampled_from(STRIDES), min_size=1, max_size=4)))
        widths = {s: draw(st.integers(1, 6)) for s in strides}
        if one_width:
            widths = dict.fromkeys(strides, widths[strides[0]])
        maps = harness.maps(strides, widths, padded, images, seed + 100 * who)
        logits = harness.maps(strides, 4, padded, images, seed + 100 * who + 50)
        deltas = harness.maps(strides, 4 * ANCHORS, padded, images, seed + 100 * who + 60)
        boxes = {s: boxes_like(x, padded, random) for s, x in deltas.items()}
        anchors = {s: boxes_like(x[:1], padded, random).expand_as(x) for s, x in deltas.items()}
        found.append(dict(fpn=maps, logits=logits, deltas=deltas, boxes=boxes, anchors=anchors))
    sizes = [tuple(draw(st.integers(1, side)) for side in padded) for _ in range(images)]
    boxes = [[(0, 0, w, h)] if draw(switch) else [] for h, w in sizes]
    labels = {
        s: torch.randint(-1, 4 // ANCHORS + 1, (images, ANCHORS, *x.shape[-2:]), generator=random)
        for s, x in found[0]["logits"].items()
    }
    rows, classes = draw(st.integers(0, 5)), draw(st.integers(2, 4))
    ours, theirs = torch.randn(2, rows, classes, generator=random, dtype=torch.float64)
    regions = Regions(torch.randint(classes, (rows,), generator=random), ours, theirs)
    batch = dict(padded=padded, sizes=sizes, boxes=boxes, labels=labels, regions=regions)
    return found[0], found[1], batch


def boxes_like(deltas, padded, generator):
    """Any boxes on an image, XYXY, one for each delta's four channels."""
    n, channels, h, w = deltas.shape
    corners = torch.rand(n, channels // 4, 2, 2, h, w, generator=generator, dtype=deltas.dtype)
    limits = torch.tensor([padded[1], padded[0]]).view(2, 1, 1)
    return (corners.sort(2).values * limits).view_as(deltas)


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_a_refusal_or_finite_losses_with_gradients(kind):
    seen = Counter()

    @examples(100)
    @given(data=st.data())
    def check(data):
        seen[_refused_or_finite(kind, data)] += 1

    check()
    assert seen["refused"] and seen["finite"] >= 10, seen


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


#: Loss -> options that it is differentiable with, and draws nothing.  GanKD reverses gradients on
#: purpose, ImprovedKD draws; DKD, DenseDKD and GID read other things than maps of the fpn: they have
#: a gradcheck each in tests/losses.
SMOOTH = {
    losses.IdenticalLayer: dict(
        share=st.sampled_from(["dense", "adjacent", "none"]),
        distance=st.sampled_from(["mse", "smooth_l1", "cosine"]),
        normalize=st.sampled_from(sorted(NORMALIZATIONS)),
    ),
    losses.CrossLayer: dict(
        pairs=st.sampled_from(["dense", "adjacent"]),
        distance=st.sampled_from(["mse", "smooth_l1", "cosine"]),
        normalize=st.sampled_from(sorted(NORMALIZATIONS)),
        ignore_padding=switch,
    ),
    losses.CWD: dict(temperature=st.sampled_from([0.5, 4.0]), ignore_padding=switch),
    losses.FGD: dict(
        foreground=st.just(1.0),
        background=st.just(1.0),
        attention=st.just(1.0),
        global_=st.just(1.0),
        ignore_padding=switch,
    ),
    losses.FitNets: dict(ignore_padding=switch),
    losses.FRS: dict(feature=st.just(1.0), response=st.just(1.0)),
    losses.MGD: dict(alpha=st.just(1.0), masked=st.just(0.0), ignore_padding=switch),
    losses.PKD: dict(statistics=st.sampled_from(["batch", "image"]), ignore_padding=switch),
    losses.ReviewKD: dict(mid_channels=st.integers(1, 4)),
    losses.SemCKD: dict(hidden=st.just(3), grid=st.just(2)),
}


@pytest.mark.parametrize("kind", SMOOTH, ids=lambda kind: kind.__name__)
@examples(8)
@given(data=st.data())
def test_gradients_are_derivatives(kind, data):
    """Along any direction in the student's maps, by finite differences in float64."""
    student, teacher, batch = data.draw(pyramids())
    try:
        loss = kind(**{name: data.draw(values, name) for name, values in SMOOTH[kind].items()})
        loss = harness.awake(harness.bound(loss, student, teacher))
    except ConfigError:
        assume(False)
    draw = torch.Generator().manual_seed(1)
    direction = {
        s: torch.randn(x.shape, generator=draw, dtype=x.dtype) for s, x in student["fpn"].items()
    }

    def value(step):
        moved = {s: x + step * direction[s] for s, x in student["fpn"].items()}
        return harness.total(
            loss(harness.batch({**student, "fpn": moved}, teacher, **batch))
        ).item()

    leaves = harness.leaves(student)
    harness.total(loss(harness.batch(leaves, teacher, **batch))).backward()
    slope = sum(
        (x.grad * direction[s]).sum().item() for s, x in leaves["fpn"].items() if x.grad is not None
    )
    if kind is losses.CrossLayer:  # of both ends of a distance each is held fixed once
        slope *= 2
    step = 1e-6
    numeric = (value(step) - value(-step)) / (2 * step)
    assert slope == pytest.approx(numeric, rel=1e-4, abs=1e-6 * max(1.0, abs(value(0.0))))


sides = st.integers(1, 9)


@examples(60)
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


times = st.one_of(
    st.integers(-2, 30), st.floats(-0.2, 1.5), st.sampled_from([math.nan, math.inf, "soon", None])
)


@examples(200)
@given(
    mostly(
        st.floats(0, 5, allow_subnormal=False),
        st.sampled_from([math.nan, math.inf, -1.0, "much", None, True]),
    ),
    times,
    times,
    times,
    st.integers(1, 30),
)
def test_a_stage_is_refused_or_on_within_its_span_alone(weight, start, ramp, end, max_iter):
    stage = Stage(losses.IdenticalLayer(), weight, start, ramp, end)
    try:
        stage.check("key")
    except ConfigError:
        return
    found = [stage.weight_at(i, max_iter) for i in range(max_iter)]
    assert all(0 <= w <= weight for w in found)
    first, last = stage.span(max_iter)
    assert [i for i, w in enumerate(found) if w > 0] == list(range(first, last))
    on = found[first:last]
    assert on == sorted(on)  # it only grows


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(alphabet="abc x", max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["a", "period", "enabled"]), st.integers(), max_size=2),
)
keys = st.sampled_from([*TRAIN_DEFAULTS, "unknown"])


@examples(200)
@given(st.one_of(st.dictionaries(keys, values, max_size=6), values))
def test_any_train_group_ends_in_findings_and_possible_values(given):
    findings = Findings()
    train = settle(Train, OmegaConf.create({"train": given}).train, "train", findings)
    assert set(train) == set(TRAIN_DEFAULTS)
    assert all(e.key.startswith("train") and e.fix for e in findings.errors)
    again = Findings()
    assert settle(Train, OmegaConf.create(train), "train", again) == train
    assert again.errors == []


@pytest.fixture(scope="module")
def detectors():
    """(family, depth) -> a small detector, built once."""
    built = {}

    def get(family, depth):
        if (family, depth) not in built:
            built[family, depth] = tiny.detector(family, depth)
        return built[family, depth]

    return get


@examples(6)
@given(data=st.data())
def test_tiny_pairs(detectors, data):
    families = st.sampled_from(["faster_rcnn", "retinanet", "fcos"])
    student = detectors(data.draw(families), 18).train()
    teacher = FrozenTeacher(detectors(data.draw(families), 50), weights="")
    tap = data.draw(st.sampled_from(["fpn", "backbone"]))
    strides = data.draw(st.one_of(st.none(), st.lists(st.sampled_from(STRIDES), max_size=3)))
    kind = data.draw(st.sampled_from([losses.IdenticalLayer, losses.CrossLayer, losses.FitNets]))
    try:
        stage = Stage(kind(tap=tap, strides=strides), weight=1.0)
        model = SharedKD(student=student, teacher=teacher, stages={"x": stage}, input_format="RGB")
    except ConfigError as e:
        assert e.key.startswith(("model.stages.x.loss", "strides")) and e.fix
        return
    model.train()
    with EventStorage():
        found = model(tiny.batch())
    terms = {k: v for k, v in found.items() if k.startswith("distill/x/")}
    assert terms and all(torch.isfinite(x) for x in found.values())
    model.zero_grad()
    sum(terms.values()).backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)
    assert any(g.any() for g in gradients)
    assert all(p.grad is None for p in teacher.model.parameters())
