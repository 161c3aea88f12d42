"""FGD: box masks, attention and global context in numpy."""

import math

import numpy as np
import pytest
import torch
from losses import harness
from losses.harness import convolved, numbers, on_image, softmax

from sharedkd.losses.fgd import FGD, GlobalContext, box_weights

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


def attention_by_hand(image, temperature):
    """A^s and A^c of the part of a map that lies on its image."""
    spatial = softmax(np.abs(image).mean(0).ravel() / temperature)
    channel = softmax(np.abs(image).mean((1, 2)) / temperature)
    return spatial.size * spatial.reshape(image.shape[1:]), channel.size * channel


def context_by_hand(p, image):
    pixels = image.reshape(len(image), -1)
    score = p["mask.weight"].ravel() @ pixels + p["mask.bias"]
    context = pixels @ softmax(score)
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
        s, t = (x["fpn"][stride] for x in (student, teacher))
        sums = dict.fromkeys(WEIGHTS, 0.0)
        for a, b, found, size in zip(s, t, boxes, sizes):
            mask = mask_by_hand(found, stride, *a.shape[1:])
            a, b, mask = (on_image(x, size, stride) for x in (convolved(adapt, "", a), b, mask))
            spatial_a, channel_a = attention_by_hand(a, loss.temperature)
            spatial_b, channel_b = attention_by_hand(b, loss.temperature)
            add = context_by_hand(ours, a) - context_by_hand(theirs, b)
            squares = (b - a) ** 2 * spatial_b * channel_b[:, None, None]
            sums["foreground"] += (mask * squares).sum()
            sums["background"] += squares[:, mask == 0].sum() / max((mask == 0).sum(), 1)
            sums["attention"] += abs(channel_a - channel_b).sum()
            sums["attention"] += abs(spatial_a - spatial_b).sum()
            sums["global_"] += ((a - b + add[:, None, None]) ** 2).sum()
        for part, weight in WEIGHTS.items():
            expected[f"s{stride}_{part.rstrip('_')}"] = weight * sums[part] / len(s)
    return expected


CASES = {
    "on the borders of positions": ({}, dict(boxes=BOXES)),
    "all foreground": ({}, dict(boxes=[[[0, 0, 96, 64]], [[1, 1, 2, 2]]])),
    "outside": ({}, dict(boxes=[[[-40, -9, 20, 500], [200, 200, 300, 300]], [[-99, 5, -30, 9]]])),
    "narrower teacher": (dict(temperature=0.1), dict(ours=5, theirs=2, boxes=BOXES, images=1)),
    "large positions": ({}, dict(strides=(128,), boxes=BOXES)),
}


@harness.every_case(FGD, CASES)
def test_value(options, given):
    harness.check_value(kd(**options), by_hand, **given)


def drawn(boxes, x, stride):
    return box_weights(torch.tensor(boxes, dtype=torch.float32).view(1, -1, 4), x, stride)[0, 0]


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
