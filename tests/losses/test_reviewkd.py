"""ReviewKD: values by loops, and one-pixel levels."""

import numpy as np
import torch
from losses import harness
from losses.harness import averaged, batch, bound, convolved, maps, sigmoid

from sharedkd.losses.reviewkd import ReviewKD


def convolve(x, p, name):
    """A convolution of several images; one without a bias has none."""
    p = {f"{name}.bias": np.zeros(len(p[f"{name}.weight"])), **p}
    return np.stack([convolved(p, name, image) for image in x])


def normalise(x, p, name):
    """Batch normalisation of a training step; a single value per channel: running statistics."""
    out = np.zeros_like(x)
    for c in range(x.shape[1]):
        values = x[:, c].ravel()
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        if len(values) == 1:
            mean, variance = p[f"{name}.running_mean"][c], p[f"{name}.running_var"][c]
        out[:, c] = (x[:, c] - mean) / (variance + 1e-5) ** 0.5
        out[:, c] = out[:, c] * p[f"{name}.weight"][c] + p[f"{name}.bias"][c]
    return out


def enlarge(x, size):
    rows, columns = (np.arange(n) * old // n for n, old in zip(size, x.shape[2:]))
    return x[:, :, rows][..., columns]


def context(x, y):
    def mse(a, b):
        return sum((u - v) ** 2 for u, v in zip(a.ravel(), b.ravel())) / a.size

    h, w = x.shape[2:]
    sizes = [size for size in (4, 2, 1) if h > size and w > size]
    parts = [mse(x, y)] + [mse(averaged(x, size, size), averaged(y, size, size)) for size in sizes]
    weights = [1, 0.5, 0.25, 0.125][: len(parts)]
    return sum(w * p for w, p in zip(weights, parts)) / sum(weights)


def by_hand(loss, student, teacher, boxes, sizes):
    residual, terms = None, {}
    for stride in reversed(loss.strides):
        p = {k: v.numpy() for k, v in loss.fusions[str(stride)].state_dict().items()}
        x = normalise(convolve(student["fpn"][stride], p, "reduce.0"), p, "reduce.1")
        if residual is not None:
            up = enlarge(residual, x.shape[2:])
            gates = sigmoid(convolve(np.concatenate([x, up], 1), p, "attention"))
            x = gates[:, 0:1] * x + gates[:, 1:2] * up
        out = normalise(convolve(x, p, "output.0"), p, "output.1")
        terms[f"s{stride}"] = context(out, teacher["fpn"][stride])
        residual = x
    return dict(reversed(terms.items()))


def scrambled(loss):
    """The loss with norms that do something."""
    generator = torch.Generator().manual_seed(3)
    for name, x in [*loss.named_parameters(), *loss.named_buffers()]:
        if ".1." in name and x.dtype.is_floating_point:
            draws = torch.rand(x.shape, generator=generator, dtype=torch.float64)
            x.data.copy_(0.5 + draws)
    return loss


ONE_POSITION = dict(strides=(32, 64), padded=(64, 64))
CASES = {
    "sizes that do not divide": ({}, dict(strides=(16, 32, 64), padded=(112, 80))),
    "levels that are apart": ({}, dict(strides=(16, 64), images=1, padded=(112, 240))),
    "one position on the coarser": ({}, ONE_POSITION),
    "one position of one image on the coarser": ({}, dict(images=1, **ONE_POSITION)),
    "one level": ({}, dict(strides=(16,))),
    "constant student": ({}, dict(fills=(-2.0, None))),
}


@harness.every_case(ReviewKD, CASES)
def test_value(options, given):
    given = {"strides": (8, 16, 32), "ours": 2, **given}
    harness.check_value(ReviewKD(mid_channels=4), by_hand, ready=scrambled, **given)


def test_a_term_learns_from_its_own_level_and_all_coarser_ones():
    student = {16: None, 32: None, 64: None}
    student = {"fpn": {k: x.requires_grad_() for k, x in maps(tuple(student)).items()}}
    teacher = {"fpn": maps((16, 32, 64), seed=1)}
    terms = bound(ReviewKD(mid_channels=3), student, teacher)(batch(student, teacher))
    for stride in (16, 32, 64):
        inputs = list(student["fpn"].values())
        found = torch.autograd.grad(
            terms[f"s{stride}"], inputs, retain_graph=True, allow_unused=True
        )
        reached = {k for k, g in zip(student["fpn"], found) if g is not None and g.any()}
        assert reached == {k for k in (16, 32, 64) if k >= stride}


def test_one_pixel_of_one_image_leaves_running_statistics_alone():
    case = dict(strides=(32, 64), images=1, padded=(64, 64))
    student, teacher = {"fpn": maps(**case)}, {"fpn": maps(seed=1, **case)}
    loss = scrambled(bound(ReviewKD(mid_channels=3), student, teacher))
    before = {k: b.clone() for k, b in loss.named_buffers()}
    loss(batch(student, teacher, padded=(64, 64)))
    for name, b in loss.named_buffers():
        assert torch.equal(b, before[name]) is (".64." in name), name
