"""What holds for every loss: who learns, gradients, padding, precision, parameters, refusals."""

import inspect
import math
from collections import Counter

import hypothesis
import pytest
import torch
from detectron2.structures import Instances, RotatedBoxes
from elsewhere import Elsewhere, elsewhere, move
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from losses import harness
from losses.harness import ignores_padding
from torch.utils._pytree import tree_leaves, tree_map

from sharedkd import losses
from sharedkd.errors import ConfigError
from sharedkd.losses import (
    BCKD,
    CWD,
    DIST,
    DKD,
    FGD,
    FKD,
    FRS,
    GID,
    MGD,
    PGD,
    PKD,
    Cosine,
    CrossKD,
    CrossLayer,
    DenseDIST,
    DenseDKD,
    FeatureFusion,
    FitNets,
    GanKD,
    IdenticalLayer,
    ImprovedKD,
    RegionCrossKD,
    ReviewKD,
    SemCKD,
)
from sharedkd.losses.base import Batch
from sharedkd.modeling.stages import Stage

#: Every loss, with options for maps of a few numbers.
KINDS = {
    IdenticalLayer: {},
    CrossLayer: {},
    Cosine: {},
    CrossKD: dict(score=0.7, overlap=1.3),
    RegionCrossKD: dict(score=0.7, box=1.3),
    CWD: dict(temperature=2.0),
    DKD: dict(alpha=1.0, beta=0.25, temperature=2.0),
    DenseDKD: dict(alpha=1.0, beta=0.25),
    DIST: dict(beta=0.7, gamma=1.3, temperature=2.0),
    DenseDIST: dict(beta=0.7, gamma=1.3),
    BCKD: dict(score=0.7, overlap=1.3),
    FeatureFusion: dict(fit=0.7, feature=1.3, response=0.4),
    FGD: dict(foreground=0.7, background=1.1, attention=0.3, global_=0.9),
    FitNets: dict(adapter=3),
    FKD: dict(feature=0.7, channel=1.1, spatial=1.3, nonlocal_=0.9, pool=[2] * 4),
    FRS: dict(feature=0.3, response=0.7),
    GanKD: dict(discriminator=0.7, hidden=4, layers=2),
    GID: dict(
        feature=0.3, relation=0.7, response_class=1.1, response_box=1.3, crop=2, min_size=2.0
    ),
    ImprovedKD: {},
    MGD: dict(alpha=0.3, masked=0.4),
    PGD: dict(foreground=0.3, background=0.7, box=1.1, attention=0.9, positions=3),
    PKD: {},
    ReviewKD: dict(mid_channels=3),
    SemCKD: dict(hidden=3, grid=2),
}
BOXES = [[[3, 5, 30, 40], [10, 10, 25, 20]], [[5, 5, 20, 18]], []]
REGIONS = (DKD, DIST, RegionCrossKD)  #: compare sampled regions
every_loss = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def build(kind, **options):
    return kind(**{**KINDS[kind], **options})


def pair(strides=(8, 16, 32), widths=(3, 6), seed=0, **options):
    """A student's and a teacher's maps."""
    return tuple(
        harness.detector(strides, width, seed=seed + 10 * who, **options)
        for who, width in enumerate(widths)
    )


def given(student, images=2, sizes=None, padded=(64, 96)):
    """What is to know of the batch besides the maps."""
    found = harness.matched(student, seed=3)
    found["regions"].student.requires_grad_()
    return dict(boxes=BOXES[:images], sizes=sizes, padded=padded, **found)


def test_the_list_is_complete():
    kinds = [x for x in vars(losses).values() if inspect.isclass(x)]
    kinds = {x for x in kinds if issubclass(x, losses.DistillationLoss)}
    assert set(KINDS) == kinds - {losses.DistillationLoss}


# --- who learns, and by which gradient -------------------------------------------------------

#: Parameters without influence: a constant on all positions goes away in a softmax over them or in
#: a normalisation, and small objects are cropped from the finest level.
SILENT = {
    CWD: ("bias",),
    PKD: ("bias",),
    FGD: ("mask.bias",),
    FKD: ("out.bias",),
    GID: ("16.weight", "16.bias", "32.weight", "32.bias"),
}


@every_loss
def test_the_student_and_the_losss_own_parameters_learn_and_the_teacher_does_not(kind):
    student, teacher = pair()
    more = given(student)
    regions = more["regions"]
    regions.teacher.requires_grad_()
    before = [x.clone() for m in (student, teacher) for y in m.values() for x in y.values()]
    loss = harness.awake(harness.bound(build(kind), student, teacher))
    gradients = harness.check_who_learns(loss, student, teacher, **more)
    for tap in harness.learned(loss):
        assert any(g.any() for (at, _), g in gradients.items() if at == tap)
    assert (regions.student.grad is not None) == (kind in REGIONS) and regions.teacher.grad is None
    for name, p in loss.named_parameters():
        assert p.grad.abs().max() > 1e-9 or name.endswith(SILENT.get(kind, ())), name
    after = [x for m in (student, teacher) for y in m.values() for x in y.values()]
    assert all(map(torch.equal, before, after))


#: Losses that hold something fixed which gradcheck would move have a test in their own files.
HELD = {BCKD, CrossLayer, *REGIONS, FeatureFusion, FKD, GanKD, GID}


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in HELD], ids=lambda k: k.__name__)
def test_gradients_are_derivatives(kind):
    student, teacher = pair((16, 32), (2, 3), padded=(32, 48))
    options = dict(ignore_padding=True) if ignores_padding(kind) else {}
    loss = harness.awake(harness.bound(build(kind, **options), student, teacher))
    more = given(student, sizes=[(32, 48), (20, 30)], padded=(32, 48))
    harness.check_gradients(loss, student, teacher, **more)


@every_loss
def test_constant_maps_have_finite_values_and_gradients(kind):
    random = pair(widths=(3, 3), dtype=torch.float32)
    for fill in (0.0, 0.1, 1e4):
        constant = pair(widths=(3, 3), dtype=torch.float32, fill=fill)
        for m, n in zip(constant, random):
            m.update(boxes=n["boxes"], anchors=n["anchors"])
        for ours, theirs in ((constant, random), (random, constant), (constant, constant)):
            student, teacher = ours[0], theirs[1]
            loss = harness.bound(build(kind), student, teacher)
            more = given(student, sizes=[(64, 96), (9, 17)])
            harness.check_who_learns(loss, student, teacher, **more)


@every_loss
def test_a_bound_loss_takes_batches_of_any_size(kind):
    loss = harness.bound(build(kind), *pair())
    for images, padded in ((1, (32, 32)), (3, (80, 48)), (2, (8, 8))):
        student, teacher = pair(images=images, padded=padded)
        harness.check_who_learns(loss, student, teacher, **given(student, images, padded=padded))


@every_loss
def test_all_is_computed_on_the_device_of_the_maps(kind):
    """The ground truth lies on the CPU, as loaders deliver it."""
    student, teacher = pair(dtype=torch.float32)
    loss = move(harness.awake(harness.bound(build(kind), student, teacher)))
    more = given(student)
    student, teacher = (tree_map(Elsewhere, m) for m in (student, teacher))
    for x in tree_leaves(student):
        x.requires_grad_()
    more["labels"] = tree_map(Elsewhere, more["labels"])
    regions = more["regions"]
    for name in ("labels", "student", "teacher", "deltas"):
        setattr(regions, name, Elsewhere(getattr(regions, name)))
    regions.student.requires_grad_()
    with elsewhere():
        terms = loss(harness.batch(student, teacher, **more))
        harness.total(terms).backward()
    assert all(isinstance(x, Elsewhere) for x in terms.values())
    learners = [*tree_leaves(student), *loss.parameters(), regions.student]
    assert all(x.grad is None or isinstance(x.grad, Elsewhere) for x in learners)


@pytest.mark.parametrize("kind", [ImprovedKD, MGD])
def test_draws_follow_torchs_generator_and_differ_from_step_to_step(kind):
    student, teacher = pair()
    loss = harness.bound(build(kind), student, teacher)

    def step():
        return harness.total(loss(harness.batch(student, teacher))).item()

    torch.manual_seed(5)
    first, second = step(), step()
    torch.manual_seed(5)
    assert step() == first != second


# --- any maps --------------------------------------------------------------------------------


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
        strides = sorted(
            draw(st.sets(st.sampled_from((4, *harness.ONE_STAGE)), min_size=1, max_size=4))
        )
        widths = {s: draw(st.integers(1, 6)) for s in strides}
        if one_width:
            widths = dict.fromkeys(strides, widths[strides[0]])
        found.append(harness.detector(strides, widths, padded, images, seed + 10 * who))
    sizes = [tuple(draw(st.integers(1, side)) for side in padded) for _ in range(images)]
    boxes = [[(0, 0, w, h)] if draw(st.booleans()) else [] for h, w in sizes]
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(2, 4))
    batch = dict(padded=padded, sizes=sizes, boxes=boxes)
    return *found, {**batch, **harness.matched(found[0], rows, columns, seed)}


@every_loss
def test_any_maps_are_refused_or_have_finite_losses_and_gradients(kind):
    seen = Counter()

    @settings(
        max_examples=20,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(data=st.data())
    def check(data):
        student, teacher, more = data.draw(pyramids(one_width=kind is GID))
        options = dict(ignore_padding=data.draw(st.booleans())) if ignores_padding(kind) else {}
        if "adapter" in inspect.signature(kind).parameters:
            options["adapter"] = data.draw(st.sampled_from([None, 1, 3]))
        try:
            loss = harness.bound(build(kind, **options), student, teacher)
        except ConfigError as e:
            assert "\n" not in str(e) and e.key and e.fix
            seen["refused"] += 1
            return
        if loss.idle:
            return
        more["regions"].student.requires_grad_()
        harness.check_who_learns(loss, student, teacher, **more)
        seen["finite"] += 1

    check()
    assert seen["finite"] >= 4, seen


# --- padding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore", [True, False])
@pytest.mark.parametrize("kind", filter(ignores_padding, KINDS), ids=lambda kind: kind.__name__)
def test_ignored_padding_has_no_influence_and_no_gradient(kind, ignore):
    size, boxes = (32, 64), [[[3, 5, 30, 27]]]
    options = {MGD: dict(masked=0.0), FitNets: dict(adapter=1)}.get(kind, {})
    student, teacher = pair(images=1)
    loss = harness.bound(build(kind, ignore_padding=ignore, **options), student, teacher)
    loss = harness.awake(loss)
    expected = loss(harness.batch(student, teacher, boxes, [size]))
    noisy, cut = (
        [{"fpn": {s: change(x, s) for s, x in m["fpn"].items()}} for m in (student, teacher)]
        for change in (noise_beyond, cut_off)
    )
    # MGD's second convolution sees where the first one's bias ends: noise changes nothing.
    for other in (noisy,) if kind is MGD else (noisy, cut):
        found = loss(harness.batch(*other, boxes, [size]))
        same = [found[k].item() == pytest.approx(v.item(), rel=1e-9) for k, v in expected.items()]
        assert all(same) if ignore else not any(same)
    found = harness.check_who_learns(loss, student, teacher, boxes=boxes, sizes=[size])
    for stride in (8, 16, 32):
        beyond = noise_beyond(torch.zeros_like(found["fpn", stride]), stride) != 0
        assert found["fpn", stride][~beyond].any()
        assert found["fpn", stride][beyond].any().item() is not ignore


def noise_beyond(x, stride):
    """The map with other numbers beyond an image of 32 x 64 pixels."""
    x = x.clone()
    x[..., 32 // stride :, :] = 30.0
    x[..., 64 // stride :] = -30.0
    return x


def cut_off(x, stride):
    return x[..., : 32 // stride, : 64 // stride]


# --- precision -------------------------------------------------------------------------------


@every_loss
def test_lower_precision_is_computed_in_float32(kind):
    """Of the same rounded numbers: bfloat16 arithmetic would be off by up to 0.4 %."""
    low = [rounded(m, torch.bfloat16) for m in pair()]
    exact, more = [harness.cast(m, torch.float64) for m in low], given(low[0])
    loss = harness.awake(harness.bound(build(kind), *exact))
    torch.manual_seed(0)
    expected = loss(harness.batch(*exact, **more))
    regions = more["regions"]
    for name in ("student", "teacher", "deltas"):
        setattr(regions, name, getattr(regions, name).float())
    loss = loss.float()
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        terms = loss(harness.batch(*(rounded(m, dtype) for m in low), **more))
        for name, term in terms.items():
            assert term.dtype == torch.float32
            assert term.item() == pytest.approx(expected[name].item(), rel=1e-4), name


def rounded(maps, dtype):
    """Maps in another type; boxes and what they come from are float32 in a detector, too."""
    found = harness.cast(maps, torch.float32)
    return {**found, **harness.cast({tap: maps[tap] for tap in ("fpn", "logits")}, dtype)}


# --- parameters, by hand: two levels, 5 channels of the student and 7 of the teacher ----------

ADAPTER = 5 * 7 + 7  # a 1x1 convolution
GRID = 2**4  # numbers that describe an image to SemCKD
PARAMETERS = {
    IdenticalLayer: 0,
    CrossLayer: 0,
    CrossKD: 0,
    RegionCrossKD: 0,
    DKD: 0,
    DenseDKD: 0,
    DIST: 0,
    DenseDIST: 0,
    BCKD: 0,
    CWD: 2 * ADAPTER,
    Cosine: 2 * ADAPTER,
    PKD: 2 * ADAPTER,
    PGD: 2 * ADAPTER,
    GID: 2 * ADAPTER,
    FitNets: 2 * (9 * 5 * 7 + 7),
    FRS: 2 * (9 * 5 * 7 + 7),
    FeatureFusion: 2 * (ADAPTER + (5 + 7) * 7 + 7 + 7 + 1),
    FGD: 2 * (ADAPTER + 2 * (2 * 7 * 3 + 3 * 3 + 2 * 7 + 1)),  # inside a context 7 // 2 channels
    # three 1x1, 3x3 on one channel, and non-local blocks that are one channel wide inside
    FKD: 2 * (3 * ADAPTER + 10 + (4 * 5 + 3 + 3 * 5) + (4 * 7 + 3 + 3 * 7)),
    GanKD: 2 * (ADAPTER + (9 * 7 * 4 + 4) + (9 * 4 * 4 + 4) + (4 + 1)),
    ImprovedKD: 4 * ADAPTER,  # each level with both
    MGD: 2 * (ADAPTER + 18 * 7 * 7 + 2 * 7),
    ReviewKD: 2 * (5 * 3 + 2 * 3 + 9 * 3 * 7 + 2 * 7) + (4 * 3 + 2),
    SemCKD: 4 * ((5 * 3 + 3) + (9 * 3 * 3 + 3) + (3 * 7 + 7))
    + 4 * ((GRID + 1) * GRID // 2 + (GRID // 2 + 1) * GRID // 4),
}


@every_loss
def test_parameters(kind):
    loss = harness.bound(build(kind), *pair((8, 16), (5, 7)))
    assert harness.parameters(loss) == PARAMETERS[kind]


# --- refusals, one line each -----------------------------------------------------------------


def refused(start, call, *words):
    with pytest.raises(ConfigError) as error:
        call()
    message = str(error.value)
    assert message.startswith(start) and "\n" not in message, message
    assert all(word in message for word in words), message


POSITIVE = {
    CWD: ["temperature"],
    DKD: ["temperature"],
    DIST: ["temperature"],
    DenseDIST: ["temperature"],
    FGD: ["temperature"],
    FKD: ["temperature"],
    PGD: ["positions", "temperature"],
    SemCKD: ["temperature"],
    FeatureFusion: ["fit"],
    GID: ["instances", "candidates", "crop"],
    ReviewKD: ["mid_channels"],
    GanKD: ["discriminator", "hidden", "layers"],
}


@pytest.mark.parametrize("kind, key", [(k, key) for k, keys in POSITIVE.items() for key in keys])
def test_numbers_above_zero(kind, key):
    assert getattr(build(kind, **{key: 2}), key) == 2
    for value in (0, math.inf, math.nan, "1", True, None):
        refused(f"{key}={value!r}: ", lambda v=value: build(kind, **{key: v}), "use a ")


#: Beside those of Shared-KD, which tests/misconfigurations.py has.
BAD_OPTIONS = [
    (BCKD, "overlap", -1.0, ""),
    (CrossKD, "left", 0.5, ""),
    (CrossKD, "score", -1.0, ""),
    (RegionCrossKD, "left", -1, ""),
    (RegionCrossKD, "box", math.nan, ""),
    (DIST, "gamma", -1.0, ""),
    (DenseDIST, "beta", math.nan, ""),
    (DKD, "alpha", -1.0, ""),
    (DKD, "beta", math.nan, ""),
    (DenseDKD, "beta", -2, ""),
    (DenseDKD, "gamma", 0.5, "0, 1 or 2"),
    (FeatureFusion, "response", -0.5, ""),
    (FGD, "global_", math.nan, ""),
    (FKD, "feature", -1, ""),
    (FKD, "pool", [2, 0], ""),
    (FKD, "reduction", [1.5], ""),
    (FRS, "response", math.nan, ""),
    (GID, "instances", 0, ""),
    (GID, "candidates", -1, ""),
    (GID, "crop", 2.5, ""),
    (GID, "nms", 0, ""),
    (GID, "match", 1.5, ""),
    (GID, "positions", "points", "anchors, boxes"),
    (GID, "min_size", -1, ""),
    (GID, "relation", -1.0, ""),
    (GID, "beta", math.nan, ""),
    (ImprovedKD, "reach", 0.5, ""),
    (ImprovedKD, "samples", 1.5, ""),
    (MGD, "alpha", -1, ""),
    (MGD, "masked", -0.1, ""),
    (PGD, "xi_box", 1.5, ""),
    (PGD, "growth", -1, ""),
    (PGD, "box", math.nan, ""),
    (PKD, "statistics", "group", "batch, image"),
    (SemCKD, "hidden", 0, ""),
    (SemCKD, "grid", 1, ""),
]


@pytest.mark.parametrize("kind, key, value, words", BAD_OPTIONS)
def test_options_that_cannot_be_meant(kind, key, value, words):
    refused(f"{key}={value}: ", lambda: build(kind, **{key: value}), words)


FPN = {"fpn": {8: 4, 16: 4}}
WIDE = {"fpn": {8: 6, 16: 6}}
HEADS = {tap: {8: 4, 16: 4, 32: 4} for tap in ("fpn", "logits", "deltas", "boxes", "anchors")}
BAD_BINDS = [
    (IdenticalLayer(), FPN, {"fpn": {4: 4, 32: 4}}, "key=IdenticalLayer", "in common"),
    (IdenticalLayer(strides=[8, 64]), FPN, FPN, "key.strides=[8, 64]", "use key.strides=[8]"),
    (IdenticalLayer(strides=[16]), FPN, {"fpn": {8: 4}}, "key.strides=[16]", "usable are [8]"),
    (CrossLayer(tap="backbone"), FPN, None, "key.tap=backbone", "student"),
    (
        IdenticalLayer(tap="backbone"),
        {**FPN, "backbone": {8: 4}},
        FPN,
        "key.tap=backbone",
        "teacher",
    ),
    (CrossLayer(strides=[8]), FPN, None, "key.strides=[8]", "two strides"),
    *(
        (build(k, adapter=0), HEADS, {**HEADS, **WIDE}, "key.adapter=0: ", "4 channels")
        for k in (CWD, PKD, Cosine, FitNets, FRS, FeatureFusion, GanKD)
    ),
    (FitNets(adapter=2), FPN, WIDE, "key.adapter=2: ", "odd"),
    (build(FKD, pool=[2]), FPN, FPN, "key.pool=[2]", "[8, 16]"),
    (build(FKD, reduction=[2]), FPN, FPN, "key.reduction=[2]", "[8, 16]"),
    (build(FRS), HEADS, {"fpn": HEADS["fpn"]}, "key.tap=logits:", "teacher"),
    *(
        (
            build(k),
            HEADS,
            {**HEADS, "logits": {**HEADS["logits"], 16: 80}},
            f"key={k.__name__}: ",
            "logits of stride 16 have 4 channels, the teacher's 80",
        )
        for k in (BCKD, CrossKD, DenseDIST, DenseDKD, FRS, GID, PGD)
    ),
    (build(GID), HEADS, {**HEADS, "deltas": dict.fromkeys((8, 16, 32), 8)}, "key=GID: ", "deltas"),
    (
        build(CrossKD),
        HEADS,
        {**HEADS, "logits": {**HEADS["logits"], 64: 4}},
        "key=CrossKD: the student's head has levels [8, 16, 32], the teacher's [8, 16, 32, 64]",
        "",
    ),
    (build(GID, strides=[8, 32]), HEADS, HEADS, "key.strides=[8, 32]: ", "twice"),
    (
        build(GID),
        HEADS,
        {**HEADS, "fpn": {8: 4, 16: 4, 32: 9}},
        "key.strides=[8, 16, 32]: ",
        "4, 4, 9",
    ),
    (build(GID), HEADS, {k: v for k, v in HEADS.items() if k != "anchors"}, "key.tap=anchors:", ""),
]


@pytest.mark.parametrize("loss, student, teacher, start, word", BAD_BINDS)
def test_pairs_that_cannot_be_bound(loss, student, teacher, start, word):
    refused(start, lambda: loss.bind(student, teacher, "key"), word)


@every_loss
def test_a_loss_that_reads_a_teacher_needs_one(kind):
    loss = build(kind)
    if "teacher" in loss.needs:
        start = f"key={kind.__name__}: needs a teacher"
        refused(start, lambda: loss.bind(HEADS, None, "key"), "model.teacher")
    else:
        loss.bind(HEADS, None, "key")
        assert kind is CrossLayer


def test_published_strides_are_intersected_with_those_of_the_pair(sharedkd_log):
    loss = Stage(IdenticalLayer(strides=[4, 8, 16, 32]), published=True).loss
    loss.bind({"fpn": {8: 4, 16: 4, 64: 4}}, {"fpn": {4: 4, 8: 4, 16: 4}}, "key")
    assert loss.strides == [8, 16]
    (line,) = [x.getMessage() for x in sharedkd_log.records if "key" in x.getMessage()]
    assert "stride [4, 32, 64] on the fpn tap have no part in it; it uses [8, 16]" in line
    loss = Stage(IdenticalLayer(strides=[64]), published=True).loss
    refused("key.strides=[64]", lambda: loss.bind(FPN, FPN, "key"), "use key.strides=[8,16]")


def test_lists_by_level_stay_with_their_levels():
    """FKD's reductions are 1, 2, 3 and 4 for the strides 4 to 32: a pair without stride 4 has 2 to 4."""
    loss = build(FKD, strides=[4, 8, 16, 32], pool=[1, 1, 1, 1], reduction=[1, 2, 3, 4])
    loss.published = True
    pyramid = {"fpn": {8: 12, 16: 12, 32: 12}}
    loss.bind(pyramid, pyramid, "key")
    widths = {s: m.theta.out_channels for s, m in loss.student_nonlocal.items()}
    assert widths == {"8": 6, "16": 4, "32": 3}


def test_cross_layer_is_idle_where_a_student_has_one_level(sharedkd_log):
    loss = CrossLayer()
    loss.bind({"fpn": {32: 4}}, None, "key")
    assert loss.idle and "key: the student has one level on the fpn tap" in sharedkd_log.text


TURNED = {
    0: (10, 15, 110, 105),
    90: (15, 10, 105, 110),
    # half the sides: 50 cos 30 + 45 sin 30 = 65.80, and 50 sin 30 + 45 cos 30 = 63.97
    -30: (60 - 65.80, 60 - 63.97, 60 + 65.80, 60 + 63.97),
}


@pytest.mark.parametrize("angle", TURNED)
def test_rotated_boxes_become_those_that_enclose_them(angle):
    """A box of 100 x 90 about (60, 60)."""
    truth = Instances((160, 208))
    truth.gt_boxes = RotatedBoxes(torch.tensor([[60.0, 60.0, 100.0, 90.0, angle]]))
    maps = {"fpn": {8: torch.zeros(1, 1, 20, 26)}}
    (found,) = Batch(maps, None, [(160, 208)], [{"instances": truth}]).boxes
    torch.testing.assert_close(found, torch.tensor([TURNED[angle]]).float(), rtol=0, atol=0.01)
