"""GID: which instances are chosen, and the four terms on them."""

import math

import numpy as np
import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou
from losses.harness import (
    batch,
    bound,
    cast,
    check_gradients,
    check_who_learns,
    iou,
    learners,
    leaves,
    maps,
    same,
    sigmoid,
)

from sharedkd.losses.gid import GID

A, K = 2, 3
WEIGHTS = dict(feature=0.3, relation=0.7, response_class=1.1, response_box=1.3)
STRIDES = (16, 32)
PADDED = (448, 512)  # large enough that an instance may belong to the coarser level


def decoded(strides, padded, images, seed, low, high):
    """Boxes about their positions, on quarters of a pixel, which float32 holds as they are."""
    draw = torch.Generator().manual_seed(seed)
    result = {}
    for stride, like in maps(strides, A, padded, images).items():
        n, a, h, w = like.shape
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        middle = torch.stack([x, y, x, y]).double() * stride + stride / 2
        middle = middle + torch.randn(n, a, 4, h, w, generator=draw).double() * stride / 4
        span = torch.rand(1, a, 2, h, w, generator=draw).double() * math.log(high / low)
        half = torch.cat([-span.exp(), span.exp()], 2) * low / 2
        result[stride] = ((middle + half) * 4).round().div(4).flatten(1, 2)
    return result


def pyramids(seed, strides=STRIDES, padded=PADDED, images=2, channels=3, low=24, high=700):
    given = dict(padded=padded, images=images)
    return {
        "fpn": maps(strides, channels, seed=seed, **given),
        "logits": maps(strides, A * K, seed=seed + 100, **given),
        "deltas": maps(strides, A * 4, seed=seed + 200, **given),
        "boxes": decoded(strides, padded, images, seed + 300, low, high),
        "anchors": {
            s: x.expand(images, -1, -1, -1)
            for s, x in decoded(strides, padded, 1, seed + 400, low, high).items()
        },
    }


def small(seed, **options):
    options = {"strides": (8, 16, 32), "padded": (64, 96), "low": 12, "high": 90, **options}
    return pyramids(seed, **options)


# --- by hand ---------------------------------------------------------------------------------


def clip(box, size):
    return [min(max(v, 0), size[1 - i % 2]) for i, v in enumerate(box)]


def anchors_of(maps_, image):
    """Every anchor of an image: (where, logits, deltas, box, itself)."""
    found, taps = [], ("logits", "deltas", "boxes", "anchors")
    for stride in sorted(maps_["logits"]):
        z, *others = (maps_[tap][stride][image].numpy() for tap in taps)
        for a in range(A):
            for y in range(z.shape[1]):
                for x in range(z.shape[2]):
                    values = [m[a * 4 : a * 4 + 4, y, x].tolist() for m in others]
                    scores = z[a * K : (a + 1) * K, y, x].tolist()
                    found.append(((stride, a, y, x), scores, *values))
    return found


def select(
    student,
    teacher,
    image,
    size,
    instances=10,
    candidates=3000,
    min_size=10.0,
    nms=0.3,
    match=0.5,
    positions="anchors",
):
    """[(box, index of its anchor)], the anchors of both, and which anchors lie on an instance."""
    ours, theirs = anchors_of(student, image), anchors_of(teacher, image)
    scored = []
    for i, (s, t) in enumerate(zip(ours, theirs)):
        p, q = (sigmoid(max(v[1])) for v in (s, t))
        scored.append((abs(p - q), i, clip(t[3] if q > p else s[3], size)))
    scored.sort(key=lambda v: -v[0])
    chosen = []
    for _, i, box in scored[:candidates]:
        if box[2] - box[0] <= min_size or box[3] - box[1] <= min_size:
            continue
        if len(chosen) < instances and all(iou(box, other) <= nms for other, _ in chosen):
            chosen.append((box, i))
    matched = set()
    for box, origin in chosen:
        if positions == "anchors":
            found = [iou(s[4], box) for s in ours]
            matched |= {i for i, x in enumerate(found) if x == max(found) > 0}
        else:
            found = [iou(clip(t[3], size), box) for t in theirs]
            matched.add(origin)
        matched |= {i for i, x in enumerate(found) if x >= match}
    return chosen, ours, theirs, sorted(matched)


def sample(level, y, x):
    """Bilinear, border repeated for a pixel's width, zero beyond."""
    height, width = level.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(level.shape[0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    low, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = level[:, top, left] * (1 - dx) + level[:, top, right] * dx
    lower = level[:, low, left] * (1 - dx) + level[:, low, right] * dx
    return upper * (1 - dy) + lower * dy


def crop(fpn, image, box, size):
    strides = sorted(fpn)
    area = (box[2] - box[0]) * (box[3] - box[1])
    level = math.floor(4 + math.log2(math.sqrt(area) / 224))
    stride = min(max(2**level, strides[0]), strides[-1])
    maps_ = fpn[stride][image].numpy()
    x0, y0, x1, y1 = (v / stride - 0.5 for v in box)
    result = np.zeros((maps_.shape[0], size, size))
    for i in range(size):
        for j in range(size):
            for u in (0.25, 0.75):
                for v in (0.25, 0.75):
                    y = y0 + (y1 - y0) * (i + u) / size
                    x = x0 + (x1 - x0) * (j + v) / size
                    result[:, i, j] += sample(maps_, y, x) / 4
    return result


def smooth_l1(x, beta):
    return np.where(abs(x) < beta, 0.5 * x * x / beta, abs(x) - beta / 2).sum()


def relations(crops):
    """Distances between instances, over their mean."""
    flat = crops.reshape(len(crops), -1)
    found = np.linalg.norm(flat[:, None] - flat, axis=-1)
    mean = found.sum() / (len(crops) * (len(crops) - 1))
    return found / mean if mean > 1e-6 else found


def by_hand(student, teacher, sizes, crop_size=10, beta=0.1, **options):
    crops_s, crops_t, entropy, regression, anchors = [], [], 0.0, 0.0, 0
    for image, size in enumerate(sizes):
        chosen, ours, theirs, matched = select(student, teacher, image, size, **options)
        for box, _ in chosen:
            crops_s.append(crop(student["fpn"], image, box, crop_size))
            crops_t.append(crop(teacher["fpn"], image, box, crop_size))
        anchors += len(matched)
        for i in matched:
            p, q = (sigmoid(np.array(m[i][1])) for m in (ours, theirs))
            entropy -= (q * np.log(p) + (1 - q) * np.log(1 - p)).sum()
            regression += smooth_l1(np.subtract(ours[i][2], theirs[i][2]), beta)
    n, feature, relation = len(crops_s), 0.0, 0.0
    if n:
        crops_s, crops_t = np.stack(crops_s), np.stack(crops_t)
        feature = ((crops_s - crops_t) ** 2).sum()
    if n >= 3:
        relation = smooth_l1(relations(crops_s) - relations(crops_t), 1.0) / (n * n - n)
    return {
        "feature": WEIGHTS["feature"] * feature / max(n * crop_size**2, 1),
        "relation": WEIGHTS["relation"] * relation,
        "response_class": WEIGHTS["response_class"] * entropy / max(anchors, 1),
        "response_box": WEIGHTS["response_box"] * regression / max(anchors, 1),
    }


def gid(**options):
    return GID(**{**WEIGHTS, **options})


# --- values ----------------------------------------------------------------------------------


def whole_image(student, teacher, image):
    """The box about which the detectors disagree most fills the image: the coarser level's."""
    teacher["boxes"][16][image, 4:, 3, 5] = torch.tensor([0.0, 0, 512, 448])
    teacher["logits"][16][image, K:, 3, 5] = 30.0
    student["logits"][16][image, K:, 3, 5] = -30.0


@pytest.mark.parametrize("positions", ["anchors", "boxes"])
def test_values_on_two_levels(positions):
    student, teacher = pyramids(0, images=1), pyramids(50, images=1)
    whole_image(student, teacher, 0)
    chosen, _, _, matched = select(student, teacher, 0, PADDED, positions=positions)
    roots = [math.sqrt((b[2] - b[0]) * (b[3] - b[1])) for b, _ in chosen]
    # the case is worth something: instances of both levels, several anchors on an instance
    assert min(roots) < 448 <= max(roots) and len(matched) > len(chosen) >= 3
    loss = bound(gid(crop=2, positions=positions), student, teacher)
    expected = by_hand(student, teacher, [PADDED], crop_size=2, positions=positions)
    same(loss(batch(student, teacher, sizes=[PADDED])), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"instances": 1},  # two instances have no relation
        {"instances": 500},
        {"candidates": 7},
        {"min_size": 40.0, "beta": 1.0},
        {"match": 1.0},
        {"nms": 0.9, "match": 0.3},  # instances overlap: an anchor on two of them counts once
        {"positions": "boxes", "match": 0.2, "min_size": 0.0},
    ],
    ids=str,
)
def test_values_of_options(options):
    student, teacher = small(0), small(1)
    sizes = [(64, 96), (31, 50)]
    found = bound(gid(crop=2, **options), student, teacher)(batch(student, teacher, sizes=sizes))
    same(found, by_hand(student, teacher, sizes, crop_size=2, **options))


# --- which anchors are on an instance ----------------------------------------------------------


def boxed(maps_, boxes, tap="boxes", elsewhere=(0, 0, 0, 0)):
    """The same maps where image 0 has these boxes, {(stride, a, y, x): box}, all others one box."""
    elsewhere = torch.tensor(elsewhere, dtype=torch.float64).repeat(A).view(-1, 1, 1)
    levels = {s: elsewhere.expand_as(x).clone() for s, x in maps_[tap].items()}
    for (stride, a, y, x), box in boxes.items():
        levels[stride][0, 4 * a : 4 * a + 4, y, x] = torch.tensor(box, dtype=torch.float64)
    return dict(maps_, **{tap: levels})


def responding(loss, student, teacher, **options):
    """{(image, stride, a, y, x)} of the anchors whose logits have a gradient."""
    student = dict(student, logits={s: x.clone() for s, x in student["logits"].items()})
    levels = [x.requires_grad_() for x in student["logits"].values()]
    value = loss(batch(student, teacher, **options))["response_class"]
    found = set()
    for s, g in zip(student["logits"], torch.autograd.grad(value, levels)):
        on = g.unflatten(1, (A, K)).any(2)
        found |= {(n, s, a, y, x) for n, a, y, x in on.nonzero().tolist()}
    return found


FAR = (500, 500, 540, 540)  # beyond the padded image
PLACES = [(8, 0, 1, 2), (8, 1, 7, 11), (16, 1, 0, 3), (32, 0, 1, 2), (32, 1, 0, 0)]
# Anchors and whether they are on the instance 0, 0, 40, 20 (800 square pixels).
ON_ANCHORS = {
    "at the threshold": [((0, 0, 20, 20), 1), ((0, 0, 40, 40), 1), ((0, 0, 40, 41), 0)],
    "ties": [((0, 0, 10, 20), 1), ((30, 0, 40, 20), 1), ((0, 0, 9, 20), 0)],
    "touching is no overlap": [((40, 0, 60, 20), 0), ((0, 20, 40, 40), 0)],
}


@pytest.mark.parametrize("case", ON_ANCHORS)
def test_anchors_on_an_instance(case):
    chosen = {(16, 0, 2, 2): [0, 0, 40, 20]}  # predicted far from the anchors that are on it
    student, teacher = (boxed(small(i), chosen) for i in (0, 1))
    anchors = dict(zip(PLACES, (box for box, _ in ON_ANCHORS[case])))
    student = boxed(student, anchors, "anchors", FAR)
    teacher["anchors"] = {s: torch.full_like(x, math.nan) for s, x in teacher["anchors"].items()}
    expected = {(0, *at) for at, (_, on) in zip(PLACES, ON_ANCHORS[case]) if on}
    loss = bound(gid(), student, teacher)
    assert responding(loss, student, teacher) == expected
    terms = loss(batch(student, teacher))
    same(terms, by_hand(student, teacher, [(64, 96)] * 2))
    assert terms["feature"] > 0 and (terms["response_box"] > 0) == bool(expected)


def test_anchors_are_matched_as_retinanet_matches_ground_truth():
    student, teacher = small(0), small(1)
    match = 0.5
    sizes = [(64, 96), (40, 50)]
    matcher = Matcher([match - 0.1, match], [0, -1, 1], allow_low_quality_matches=True)
    expected = set()
    for image, size in enumerate(sizes):
        chosen, ours, *_ = select(student, teacher, image, size)
        instances = Boxes(torch.tensor([box for box, _ in chosen], dtype=torch.float64))
        anchors = Boxes(torch.tensor(np.stack([s[4] for s in ours])))
        labels = matcher(pairwise_iou(instances, anchors))[1]
        assert {*labels.tolist()} == {0, -1, 1}
        expected |= {(image, *s[0]) for s, label in zip(ours, labels) if label == 1}
    loss = bound(gid(match=match), student, teacher)
    assert responding(loss, student, teacher, sizes=sizes) == expected


# --- few or no instances ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "positions, box",
    [
        ("anchors", [200, 10, 300, 60]),
        ("boxes", [9, 9, 4, 4]),
    ],
)
def test_no_instances(positions, box):
    """On the padding only, inside out."""
    student, teacher = (boxed(small(i), {}, elsewhere=box) for i in (0, 1))
    loss = bound(gid(adapter=1, positions=positions), student, teacher)
    terms = loss(batch(student, teacher, sizes=[(64, 96), (60, 90)]))
    assert list(terms) == list(WEIGHTS) and all(x == 0 for x in terms.values())
    gradients = check_who_learns(loss, student, teacher)
    assert not any(g is not None and g.any() for g in gradients.values())


# --- gradients -------------------------------------------------------------------------------


def test_gradients():
    options = dict(strides=(8, 16), padded=(16, 16), channels=1, images=2, low=4, high=14)
    student, teacher = pyramids(0, **options), pyramids(1, **options)
    loss = bound(gid(crop=2, instances=3, min_size=2.0), student, teacher)
    sizes = [(16, 16), (14, 15)]
    assert all(x > 0 for x in loss(batch(student, teacher, sizes=sizes)).values())
    check_gradients(loss, student, teacher, sizes=sizes)


def test_the_selection_has_no_gradient():
    student, teacher = leaves(small(0)), small(1)
    terms = bound(gid(), student, teacher)(batch(student, teacher))

    def learns(name):
        maps_ = {f"{tap}/{s}": [x] for tap, levels in student.items() for s, x in levels.items()}
        return {name.partition("/")[0] for name in learners(terms[name], **maps_)}

    assert learns("feature") == learns("relation") == {"fpn"}
    assert learns("response_class") == {"logits"} and learns("response_box") == {"deltas"}


def test_relation_ignores_the_scale_and_offset_of_features():
    student, teacher = small(0), small(1)
    loss = bound(gid(), student, teacher)
    before = loss(batch(student, teacher))["relation"].item()
    other = dict(student, fpn={s: 5 * x + 300 for s, x in student["fpn"].items()})
    given = [cast(x, torch.float32) for x in (other, teacher)]
    assert loss(batch(*given))["relation"].item() == pytest.approx(before, rel=1e-3)
