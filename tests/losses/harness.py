"""What every loss's test needs: pyramids, ground truth, and the checks that hold for any loss."""

import inspect

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sharedkd.losses import Batch, Regions

ANCHORS, CLASSES = 2, 2  # of a position, in the maps of `detector`
TWO_STAGE, ONE_STAGE = (4, 8, 16, 32, 64), (8, 16, 32, 64, 128)


def maps(strides, channels=4, padded=(64, 96), images=2, seed=0, dtype=torch.float64, fill=None):
    """stride -> random map of an image batch padded to ``padded`` pixels; or filled with a number."""
    generator = torch.Generator().manual_seed(seed)
    widths = dict.fromkeys(strides, channels) if isinstance(channels, int) else channels
    result = {}
    for stride in strides:
        size = (images, widths[stride], -(-padded[0] // stride), -(-padded[1] // stride))
        random = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        result[stride] = random if fill is None else torch.full_like(random, fill)
    return result


def pair(strides=(8, 16), ours=3, theirs=3, **options):
    """Maps of a student's and a teacher's FPN."""
    student = {"fpn": maps(strides, ours, seed=1, **options)}
    return student, {"fpn": maps(strides, theirs, seed=2, **options)}


def detector(strides, channels=4, padded=(64, 96), images=2, seed=0, **more):
    """Maps on every tap of a detector; boxes and anchors are any on the image, XYXY."""
    given = dict(padded=padded, images=images, **more)
    deltas = maps(strides, 4 * ANCHORS, seed=seed + 2, **given)
    generator = torch.Generator().manual_seed(seed)

    def boxes(x):
        n, _, h, w = x.shape
        corners = torch.rand(n, ANCHORS, 2, 2, h, w, generator=generator, dtype=torch.float64)
        limits = torch.tensor([padded[1], padded[0]]).view(2, 1, 1)
        return (corners.sort(2).values * limits).view_as(x).to(x.dtype)

    return {
        "fpn": maps(strides, channels, seed=seed, **given),
        "logits": maps(strides, ANCHORS * CLASSES, seed=seed + 1, **given),
        "deltas": deltas,
        "boxes": {s: boxes(x) for s, x in deltas.items()},
        "anchors": {s: boxes(x[:1]).expand_as(x) for s, x in deltas.items()},
    }


def matched(student, rows=6, columns=4, seed=0):
    """What a student's own matching gives: labels of anchors, and sampled regions.

    Of these, the teacher's head makes the student's logits and, of them, deltas.
    """
    draw = torch.Generator().manual_seed(seed)
    labels = {
        s: torch.randint(-1, CLASSES + 1, (len(x), ANCHORS, *x.shape[-2:]), generator=draw)
        for s, x in student["logits"].items()
    }
    ours, theirs = torch.randn(2, rows, columns, generator=draw, dtype=torch.float64)
    deltas = torch.randn(rows, 4 * (columns - 1), generator=draw, dtype=torch.float64)
    regions = Regions(torch.randint(columns, (rows,), generator=draw), ours, theirs, deltas)
    regions.crossed = lambda left: (regions.student, regions.student[:, :1] * regions.deltas)
    return dict(labels=labels, regions=regions)


def cast(levels, dtype):
    return {tap: {s: x.to(dtype) for s, x in found.items()} for tap, found in levels.items()}


def shapes(levels):
    """Maps by tap -> what a loss is bound to."""
    return {tap: {s: x.shape[1] for s, x in found.items()} for tap, found in levels.items()}


def bound(loss, student, teacher=None, seed=0):
    """The loss bound to maps by tap, with parameters in their type; its draws depend on the seed."""
    torch.manual_seed(seed)
    loss.bind(shapes(student), None if teacher is None else shapes(teacher), "model.stages.x.loss")
    first = next(iter(next(iter(student.values())).values()))
    return loss.to(first.dtype)


def truth(boxes, size, classes=None):
    """A record's ground truth: boxes (XYXY, pixels) on an image of (height, width)."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32).view(-1, 4)
    classes = torch.zeros(len(boxes)) if classes is None else torch.as_tensor(classes)
    return {"instances": Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes.long())}


def batch(student, teacher=None, boxes=None, sizes=None, padded=(64, 96), **more):
    """A Batch of maps by tap; ``boxes``: per image a list of XYXY; ``sizes``: before padding.

    What the teacher's head makes of the student's maps is what the student's own makes of them.
    """
    first = next(iter(next(iter(student.values())).values()))
    sizes = [padded] * len(first) if sizes is None else sizes
    boxes = [[]] * len(first) if boxes is None else boxes
    inputs = [truth(b, s) for b, s in zip(boxes, sizes)]
    return Batch(student, teacher, list(sizes), inputs, crossed=lambda left: student, **more)


def total(terms):
    return sum(terms.values())


def leaves(levels):
    """The same maps by tap as leaves that collect gradients."""
    return {
        tap: {s: x.detach().clone().requires_grad_() for s, x in found.items()}
        for tap, found in levels.items()
    }


def learned(loss):
    """The taps that a loss learns through; boxes are maps of their own here, not made of deltas."""
    heads = dict.fromkeys(("BCKD", "CrossKD"), {"logits", "boxes"})  # crossed: see `batch`
    return heads.get(type(loss).__name__, loss.taps - loss.guides)


def check_who_learns(loss, student, teacher, **options):
    """Gradients reach the student's maps and the loss's parameters, all of them, never the teacher.

    It is given the taps that it declares alone.  Returns the gradients by (tap, stride).
    """
    student, teacher = (
        leaves({tap: x for tap, x in m.items() if tap in (loss.taps or m)})
        for m in (student, teacher)
    )
    terms = loss(batch(student, teacher, **options))
    for term in terms.values():
        assert term.shape == () and torch.isfinite(term)
    total(terms).backward()
    for levels in teacher.values():
        assert all(x.grad is None for x in levels.values())
    for name, p in loss.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
    gradients = {(tap, s): x.grad for tap, levels in student.items() for s, x in levels.items()}
    for (tap, s), g in gradients.items():
        if s in loss.strides and tap in learned(loss):
            assert g is not None and torch.isfinite(g).all(), (tap, s)
    return gradients


def learners(term, **owners):
    """Those, named with their tensors, that learn from a term: all of their tensors, or none."""
    found = set()
    for name, tensors in owners.items():
        gradients = torch.autograd.grad(term, [*tensors], retain_graph=True, allow_unused=True)
        moved = [g is not None and bool(g.any()) for g in gradients]
        assert all(moved) or not any(moved), name
        found |= {name} if all(moved) else set()
    return found


def check_gradients(loss, student, teacher, **options):
    """torch.autograd.gradcheck in float64 over the student's maps; draws repeat, buffers return."""
    keys = [
        (tap, s)
        for tap, levels in student.items()
        for s in levels
        if s in loss.strides and tap in learned(loss)
    ]
    buffers = {k: b.clone() for k, b in loss.named_buffers()}

    def value(*flat):
        torch.manual_seed(0)
        for k, b in loss.named_buffers():
            b.data.copy_(buffers[k])
        given = {tap: dict(levels) for tap, levels in student.items()}
        for (tap, s), x in zip(keys, flat):
            given[tap][s] = x
        return total(loss(batch(given, teacher, **options)))

    inputs = [student[tap][s].clone().requires_grad_() for tap, s in keys]
    assert torch.autograd.gradcheck(value, inputs)


def same(found, expected, rel=1e-9):
    """Terms have these names, in this order, and these values."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == ()
        assert found[name].item() == pytest.approx(value, rel=rel, abs=1e-12), name


def numbers(module):
    """A module's parameters as numpy arrays, by name."""
    return {k: p.detach().double().numpy() for k, p in module.named_parameters()}


def convolved(p, name, x, stride=1):
    """A convolution of one image (C, H, W) by loops, zeros around it; none without parameters."""
    if not p:
        return x
    weight, bias = (p[f"{name}.{k}" if name else k] for k in ("weight", "bias"))
    size = weight.shape[-1]
    around = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2))
    out = np.zeros((len(weight), -(-x.shape[1] // stride), -(-x.shape[2] // stride)))
    for o, r, c in np.ndindex(out.shape):
        y, z = stride * r, stride * c
        out[o, r, c] = (weight[o] * around[:, y : y + size, z : z + size]).sum() + bias[o]
    return out


def averaged(x, height, width):
    """An array (..., H, W) in cells of height x width, each the mean of all that it overlaps."""
    out = np.zeros((*x.shape[:-2], height, width))
    for r, c in np.ndindex(height, width):
        rows, columns = (
            slice(i * size // cells, -(-(i + 1) * size // cells))
            for i, size, cells in ((r, x.shape[-2], height), (c, x.shape[-1], width))
        )
        out[..., r, c] = x[..., rows, columns].mean((-2, -1))
    return out


def on_image(x, size, stride):
    """The part of a map (..., H, W) whose positions begin on an image of (height, width) pixels."""
    return x[..., : -(-size[0] // stride), : -(-size[1] // stride)]


def iou(a, b):
    """Of two boxes XYXY; 0 if they have no area."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    both = max(width, 0) * max(height, 0)
    either = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - both
    return both / either if either else 0.0


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    """Over the last axis."""
    powers = np.exp(x - np.max(x, -1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def parameters(loss):
    return sum(p.numel() for p in loss.parameters())


def awake(loss, seed=3):
    """The loss with every parameter random: some start at zero, where they hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for p in loss.parameters():
        random = torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2
        p.data.copy_(random.to(p.dtype))
    return loss


# --- values by hand ------------------------------------------------------------------------------

#: Overlapping and thin; across the border and beyond it; none.
BOXES = [
    [[3, 5, 40, 30], [20, 20, 90, 60], [4, 4, 4.5, 60]],
    [[-20, -9, 13, 12], [60, 50, 300, 200], [200, 200, 260, 240]],
    [],
]
PADDED = dict(images=3, sizes=[(64, 96), (64, 40), (33, 50)])
WIDTHS = {8: 2, 16: 4, 32: 3, 64: 3}, {8: 5, 16: 3, 32: 3, 64: 4}
#: What the value of every loss is tried on: options of the loss, and arguments of `check_value`.
SHARED = {
    "plain": ({}, {}),
    "other widths": ({}, dict(ours=WIDTHS[0], theirs=WIDTHS[1])),
    "one image, odd size": ({}, dict(images=1, padded=(40, 72))),
    "one position": ({}, dict(padded=(8, 8))),
}


def ignores_padding(kind):
    """Whether a loss has the option."""
    return "ignore_padding" in inspect.signature(kind).parameters


def every_case(kind, own=None):
    """Run a test of ``options`` and ``given`` on the shared cases and on a file's own."""
    padding = {"padding": ({}, PADDED)}
    if ignores_padding(kind):
        padding = {
            "padding counts": (dict(ignore_padding=False), dict(**PADDED, counted=[(64, 96)] * 3)),
            "padding ignored": (dict(ignore_padding=True), PADDED),
        }
    cases = {**SHARED, **padding, **(own or {})}
    return pytest.mark.parametrize("options, given", cases.values(), ids=cases)


def check_value(
    loss,
    by_hand,
    strides=(8, 16),
    teachers=None,
    ours=3,
    theirs=3,
    fills=(None, None),
    padded=(64, 96),
    images=2,
    sizes=None,
    counted=None,
    boxes=BOXES,
    ready=awake,
    seed=0,
):
    """Bind a loss, and compare its terms with those worked out by hand.

    Args:
        by_hand: (loss, student, teacher, boxes, sizes) -> terms.  The maps are arrays, by tap and
            stride; the sizes are of the part of each image that counts.
        teachers: the teacher's strides; None: the student's.
        fills: of the student's and the teacher's maps: a number, or None for random ones.
        sizes: (height, width) of each image before padding, in pixels; None: there is none.
        counted: the sizes that the reference is given; None: those of the images.
        ready: what becomes of the bound loss first.
        seed: of draws, which the reference makes in the same order.
    """
    pyramids = [
        detector(levels, width, padded, images, 10 * who, fill=fill)
        for who, levels, width, fill in zip(
            (0, 1), (strides, teachers or strides), (ours, theirs), fills
        )
    ]
    for levels in pyramids:
        levels[loss.tap] = levels.pop("fpn")
    ready(bound(loss, *pyramids))
    arrays = [
        {tap: {s: x.numpy() for s, x in found.items()} for tap, found in levels.items()}
        for levels in pyramids
    ]
    boxes, sizes = boxes[:images], sizes or [padded] * images
    torch.manual_seed(seed)
    expected = by_hand(loss, *arrays, boxes, counted or sizes)
    torch.manual_seed(seed)
    same(loss(batch(*pyramids, boxes, sizes, padded)), expected)


class Written(TorchDispatchMode):
    """How many numbers each operation writes into memory of its own, and of which type they are."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = filter(torch.is_tensor, tree_leaves((args, kwargs)))
        before = {x.untyped_storage().data_ptr() for x in given}
        out = function(*args, **(kwargs or {}))
        for x in filter(torch.is_tensor, tree_leaves(out)):
            if x.untyped_storage().data_ptr() not in before:
                self.sizes.append((x.untyped_storage().nbytes() // x.element_size(), x.dtype))
        return out


# --- reference of Distance -----------------------------------------------------------------------

#: Over which axes of (N, C, H, W) elements share a mean and a variance.
AXES = {"channel": (0, 2, 3), "instance": (2, 3), "position": (1,)}
ELEMENT = {
    "mse": lambda d: d * d,
    "l1": np.abs,
    "smooth_l1": lambda d: np.where(abs(d) < 1, 0.5 * d * d, abs(d) - 0.5),
}


def distance_by_hand(a, b, mask=None, distance="mse", normalize="none"):
    """Mean distance of two tensors (N, C, H, W) over the positions of the mask (N, 1, H, W)."""
    a, b = (x.detach().double().numpy() for x in (a, b))
    inside = np.ones_like(a[:, :1]) if mask is None else mask.numpy()
    inside = np.broadcast_to(inside.astype(bool), a.shape)
    if normalize != "none":
        # Positions stand for themselves, on an image or not.
        counted = True if normalize == "position" else inside
        over = dict(axis=AXES[normalize], where=counted, keepdims=True)
        a, b = ((x - x.mean(**over)) / np.sqrt(x.var(**over) + 1e-6) for x in (a, b))
    if distance != "cosine":
        return ELEMENT[distance](a - b)[inside].mean()
    lengths = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    # A vector of zeros is at right angles to everything.
    cosines = np.divide((a * b).sum(1), lengths, out=np.zeros_like(lengths), where=lengths != 0)
    return (1 - cosines)[inside[:, 0]].mean()
