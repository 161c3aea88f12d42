"""GAN-KD: values by hand, and who learns from which term."""

import numpy as np
import pytest
import torch
from losses import harness
from losses.harness import convolved, numbers, on_image, pair, sigmoid

from sharedkd.losses.gan_kd import GanKD

STRIDES = (16, 32)


def kd(**options):
    return GanKD(**{"discriminator": 0.7, "hidden": 4, "layers": 2, **options})


def logit(p, x, layers):
    """The discriminator's answer to one map (C, H, W)."""
    for k in range(layers):
        x = convolved(p, f"convs.{k}", x, stride=2)
        x = np.where(x > 0, x, 0.2 * x)
    return convolved(p, "logit", x).mean()


def by_hand(loss, student, teacher, sizes=None):
    terms = {}
    for stride in loss.strides:
        p, f = numbers(loss.discriminators[str(stride)]), numbers(loss.adapters[str(stride)])
        s, t = (x["fpn"][stride].double().numpy() for x in (student, teacher))
        caught = fooled = 0.0
        for b in range(len(s)):
            a = convolved(f, "", s[b])
            size = sizes[b] if sizes is not None and loss.ignore_padding else (1000, 1000)
            real, fake = (
                sigmoid(logit(p, on_image(x, size, stride), loss.layers)) for x in (t[b], a)
            )
            caught -= np.log(real) + np.log(1 - fake)
            fooled -= np.log(fake)
        terms[f"s{stride}_discriminator"] = loss.discriminator * caught / len(s)
        terms[f"s{stride}_student"] = fooled / len(s)
    return terms


@pytest.mark.parametrize(
    "options, maps",
    [
        ({}, {}),
        ({"layers": 3, "hidden": 2}, {"images": 1, "padded": (100, 72)}),
        ({"layers": 1, "discriminator": 3.0}, {"ours": {16: 2, 32: 4}, "theirs": {16: 5, 32: 4}}),
        ({}, {"padded": (16, 16)}),  # one position each
    ],
)
def test_value(options, maps):
    student, teacher = pair(**{"strides": STRIDES, **maps})
    loss = harness.bound(kd(**options), student, teacher)
    terms = loss(harness.batch(student, teacher, padded=maps.get("padded", (64, 96))))
    expected = by_hand(loss, student, teacher)
    harness.same(terms, expected)


@pytest.mark.parametrize("ignore, adapter", [(True, 1), (False, None)])
def test_value_with_padding(ignore, adapter):
    sizes = [(64, 40), (33, 96)]
    student, teacher = pair(STRIDES)
    loss = harness.bound(kd(ignore_padding=ignore, adapter=adapter), student, teacher)
    found = loss(harness.batch(student, teacher, sizes=sizes))
    harness.same(found, by_hand(loss, student, teacher, sizes))


def test_the_terms_gradients_separate_exactly():
    student, teacher = (harness.leaves(x) for x in pair((16,), 2, 3))
    loss = harness.bound(kd(), student, teacher)
    terms = loss(harness.batch(student, teacher))
    owners = dict(
        student=student["fpn"].values(),
        teacher=teacher["fpn"].values(),
        adapter=loss.adapters["16"].parameters(),
        discriminator=loss.discriminators["16"].parameters(),
    )
    owners = {name: [*tensors] for name, tensors in owners.items()}
    assert harness.learners(terms["s16_discriminator"], **owners) == {"discriminator"}
    assert harness.learners(terms["s16_student"], **owners) == {"student", "adapter"}


def test_gradients():
    student, teacher = pair((32,), 2, 2, padded=(64, 64))
    loss = harness.bound(kd(hidden=3), student, teacher)
    harness.check_who_learns(loss, student, teacher)

    def fooled(s):  # the discriminator's term does not count: it is blind to the student on purpose
        return loss(harness.batch({"fpn": {32: s}}, teacher))["s32_student"]

    assert torch.autograd.gradcheck(fooled, [student["fpn"][32].clone().requires_grad_()])
