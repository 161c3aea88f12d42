"""GAN-KD: values by hand, and who learns from which term."""

import numpy as np
import torch
from losses import harness
from losses.harness import convolved, numbers, on_image, pair, sigmoid

from sharedkd.losses.gan_kd import GanKD


def kd(**options):
    return GanKD(**{"discriminator": 0.7, "hidden": 4, "layers": 2, **options})


def logit(p, x, layers):
    """The discriminator's answer to one map (C, H, W)."""
    for k in range(layers):
        x = convolved(p, f"convs.{k}", x, stride=2)
        x = np.where(x > 0, x, 0.2 * x)
    return convolved(p, "logit", x).mean()


def by_hand(loss, student, teacher, boxes, sizes):
    terms = {}
    for stride in loss.strides:
        p, f = numbers(loss.discriminators[str(stride)]), numbers(loss.adapters[str(stride)])
        caught = fooled = 0.0
        for s, t, size in zip(student["fpn"][stride], teacher["fpn"][stride], sizes):
            real, fake = (
                sigmoid(logit(p, on_image(x, size, stride), loss.layers))
                for x in (t, convolved(f, "", s))
            )
            caught -= np.log(real) + np.log(1 - fake)
            fooled -= np.log(fake)
        terms[f"s{stride}_discriminator"] = loss.discriminator * caught / len(sizes)
        terms[f"s{stride}_student"] = fooled / len(sizes)
    return terms


CASES = {
    "three layers": ({"layers": 3, "hidden": 2}, {"images": 1, "padded": (100, 72)}),
    "one layer": ({"layers": 1, "discriminator": 3.0}, {}),
    "1x1, padding ignored": ({"adapter": 1, "ignore_padding": True}, harness.PADDED),
}


@harness.every_case(GanKD, CASES)
def test_value(options, given):
    harness.check_value(kd(**options), by_hand, **given)


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
