"""FGD: box masks, attention and global context against loops."""

import math

import numpy as np
import pytest
import torch
from losses import harness
from losses.harness import convolved, numbers, pair

from sharedkd.losses.fgd import FGD, GlobalContext, foreground

WEIGHTS = dict(foreground=0.7, background=1.1, attention=0.3, global_=0.9)
BOXES = [
    [[3, 5, 30, 40], [10, 10, 25, 20], [0, 0, 96, 64], [40, 8, 48, 16], [90, 60, 96, 64]],
    [[33.5, 0.5, 34.5, 63]],
]


def kd(**options):
    return FGD(**{**WEIGHTS, **options})


def mask_by_hand(boxes, stride, height, width):
    """As the public code paints it, with slices, but with boxes divided by the stride."""
    mask = np.zeros((height, width))
    for x0, y0, x1, y1 in boxes:
        left, top = math.floor(x0 / stride), math.floor(y0 / stride)
        right, bottom = math.ceil(x1 / stride), math.ceil(y1 / stride)

        def limit(value, size):
            return min(max(value, 0), size)

        across = limit(right, width) - limit(left, width) + 1
        down = limit(bottom, height) - limit(top, height) + 1
        for y in range(height):
            for x in range(width):
                if left <= x <= right and top <= y <= bottom:
                    mask[y, x] = max(mask[y, x], 1 / (across * down))
    return mask


def softmax(values):
    powers = [math.exp(v - max(values)) for v in values]
    return [p / sum(powers) for p in powers]


def attention_by_hand(image, temperature, real):
    """A^s, zero beyond the real rows and columns, and A^c."""
    cells = [(y, x) for y in range(real[0]) for x in range(real[1])]
    shares = softmax([np.abs(image[:, y, x]).mean() / temperature for y, x in cells])
    spatial = np.zeros(image.shape[1:])
    for (y, x), share in zip(cells, shares):
        spatial[y, x] = len(cells) * share
    means = [np.abs(channel[: real[0], : real[1]]).mean() / temperature for channel in image]
    return spatial, np.array([len(means) * share for share in softmax(means)])


def context_by_hand(p, image, real):
    cells = [(y, x) for y in range(real[0]) for x in range(real[1])]
    score = [float(p["mask.weight"].ravel() @ image[:, y, x]) + p["mask.bias"][0] for y, x in cells]
    context = sum(w * image[:, y, x] for (y, x), w in zip(cells, softmax(score)))
    hidden = p["add.0.weight"].reshape(len(p["add.0.bias"]), -1) @ context + p["add.0.bias"]
    hidden = (hidden - hidden.mean()) / math.sqrt(hidden.var() + 1e-5)
    hidden = hidden * p["add.1.weight"].ravel() + p["add.1.bias"].ravel()
    hidden = np.maximum(hidden, 0)
    return p["add.3.weight"].reshape(len(p["add.3.bias"]), -1) @ hidden + p["add.3.bias"]


def by_hand(loss, student, teacher, boxes, sizes):
    expected = {}
    for stride in loss.strides:
        modules = (loss.adapt, loss.student_context, loss.teacher_context)
        adapt, ours, theirs = (numbers(m[str(stride)]) for m in modules)
        s, t = (x["fpn"][stride].double().numpy() for x in (student, teacher))
        sums = dict.fromkeys(WEIGHTS, 0.0)
        for a, b, found, size in zip(s, t, boxes, sizes):
            a = convolved(adapt, "", a)
            channels, height, width = a.shape
            real = (height, width)
            if loss.ignore_padding:
                real = tuple(min(math.ceil(x / stride), n) for x, n in zip(size, real))
            mask = mask_by_hand(found, stride, height, width)
            spatial_a, channel_a = attention_by_hand(a, loss.temperature, real)
            spatial_b, channel_b = attention_by_hand(b, loss.temperature, real)
            add = context_by_hand(ours, a, real) - context_by_hand(theirs, b, real)
            empty = sum(mask[y, x] == 0 for y in range(real[0]) for x in range(real[1]))
            for c in range(channels):
                sums["attention"] += abs(channel_a[c] - channel_b[c])
                for y in range(real[0]):
                    for x in range(real[1]):
                        square = (b[c, y, x] - a[c, y, x]) ** 2
                        square *= spatial_b[y, x] * channel_b[c]
                        sums["foreground"] += mask[y, x] * square
                        sums["background"] += square / empty if mask[y, x] == 0 else 0
                        sums["global_"] += (a[c, y, x] - b[c, y, x] + add[c]) ** 2
            for y in range(real[0]):
                for x in range(real[1]):
                    sums["attention"] += abs(spatial_a[y, x] - spatial_b[y, x])
        for part, weight in WEIGHTS.items():
            expected[f"s{stride}_{part.rstrip('_')}"] = weight * sums[part] / len(s)
    return expected


CASES = {
    "plain": ({}, {}, {}, {}),
    "boxes in one image": ({}, {}, {}, dict(boxes=[[], BOXES[0]])),
    "all foreground": ({}, {}, {}, dict(boxes=[[[0, 0, 96, 64]], [[1, 1, 2, 2]]])),
    "outside": (
        {},
        {},
        {},
        dict(boxes=[[[-40, -9, 20, 500], [200, 200, 300, 300]], [[-99, 5, -30, 9]]]),
    ),
    "wider teacher": (dict(temperature=0.1), dict(ours=2, theirs=5), {}, {}),
    "narrower teacher": ({}, dict(ours=5, theirs=2), dict(images=1), dict(boxes=BOXES[:1])),
    "one pixel": (dict(strides=[128]), dict(strides=(128,)), {}, {}),
    "padding counts": ({}, {}, {}, dict(sizes=[(64, 96), (41, 50)])),
    "ignored": (dict(ignore_padding=True), {}, {}, dict(sizes=[(64, 96), (41, 50)])),
}


@pytest.mark.parametrize("options, widths, given, more", CASES.values(), ids=CASES)
def test_value(options, widths, given, more):
    student, teacher = pair(**widths, **given)
    loss = harness.awake(harness.bound(kd(**options), student, teacher))
    more = {"boxes": BOXES, **more}
    terms = loss(harness.batch(student, teacher, **more))
    sizes = more.get("sizes", [(64, 96)] * len(more["boxes"]))
    expected = by_hand(loss, student, teacher, more["boxes"], sizes)
    harness.same(terms, expected)


def drawn(boxes, x, stride):
    return foreground(torch.tensor(boxes, dtype=torch.float32).view(1, -1, 4), x, stride)[0, 0]


def test_mask_of_a_box():
    """Cells 1 to 3 across and 2 to 5 down, the last of each only by the inclusive end."""
    mask = drawn([8, 16, 24, 40], torch.zeros(1, 1, 8, 12), 8)
    expected = torch.zeros(8, 12)
    expected[2:6, 1:4] = 1 / 12
    assert torch.equal(mask, expected)


def test_the_smallest_box_wins():
    mask = drawn([[0, 0, 64, 64], [17, 17, 23, 23]], torch.zeros(1, 1, 16, 16), 8)
    assert mask[2:4, 2:4].eq(1 / 4).all()
    assert (mask[0, 0] - 1 / 81).abs() < 1e-8


@pytest.mark.parametrize("count", [32, 33, 70])
def test_crowded_images(count):
    random = np.random.default_rng(count)
    corners = random.uniform(0, 60, (count, 2))
    boxes = np.concatenate([corners, corners + random.uniform(1, 40, (count, 2))], 1)
    boxes = boxes.astype(np.float32)
    mask = drawn(boxes.tolist(), torch.zeros(1, 1, 8, 12, dtype=torch.float64), 8)
    assert np.allclose(mask.numpy(), mask_by_hand(boxes.tolist(), 8, 8, 12), rtol=1e-12, atol=0)


def test_at_the_start_the_context_adds_nothing():
    assert not GlobalContext(4)(torch.randn(2, 4, 3, 5), None).any()
