"""Feature fusion: values by hand, where it starts, and what learns from which term."""

import numpy as np
import pytest
import torch
from losses import harness
from losses.harness import BOXES, convolved, numbers, on_image, pair, sigmoid

from sharedkd.losses.feature_fusion import FeatureFusion


def kd(**options):
    return FeatureFusion(**{"fit": 0.7, "feature": 1.3, "response": 0.4, **options})


def by_hand(loss, student, teacher, boxes, sizes):
    terms = {}
    for stride in loss.strides:
        fusion, classifier, adapter = (
            numbers(m[str(stride)]) for m in (loss.fusions, loss.classifiers, loss.adapters)
        )
        s, t = (x["fpn"][stride] for x in (student, teacher))
        fits, features, responses = [], [], []
        for maps, found, size in zip(zip(s, t), boxes, sizes):
            a, b = (on_image(x, size, stride) for x in maps)
            y, x = (np.indices(a.shape[1:]) + 0.5) * stride
            inside = [(x1 <= x) & (x < x2) & (y1 <= y) & (y < y2) for x1, y1, x2, y2 in found]
            fused = convolved(fusion, "", np.concatenate([a, b]))
            adapted = convolved(adapter, "", a)
            p, q = (sigmoid(convolved(classifier, "", m)[0]) for m in (fused, adapted))
            fits.append(-np.log(np.where(np.any(inside, 0), p, 1 - p)).ravel())
            features.append(((adapted - fused) ** 2).ravel())
            responses.append((-p * np.log(q) - (1 - p) * np.log(1 - q)).ravel())
        terms[f"s{stride}_fit"] = loss.fit * np.concatenate(fits).mean()
        terms[f"s{stride}_feature"] = loss.feature * np.concatenate(features).mean()
        terms[f"s{stride}_response"] = loss.response * np.concatenate(responses).mean()
    return terms


@harness.every_case(
    FeatureFusion,
    {
        "no boxes": ({}, dict(boxes=[[], []])),
        "1x1": (dict(adapter=1), dict(images=1, padded=(40, 24))),
        "1x1, one position": (dict(adapter=1), dict(strides=(128,))),
    },
)
def test_value(options, given):
    harness.check_value(kd(**options), by_hand, **given)


def test_at_first_the_feature_term_is_that_of_fitnets():
    student, teacher = pair()
    loss = harness.bound(kd(feature=1.0, response=0.0), student, teacher)
    terms = loss(harness.batch(student, teacher, BOXES))
    for stride in loss.strides:
        mse = (student["fpn"][stride] - teacher["fpn"][stride]).square().mean()
        assert terms[f"s{stride}_feature"].item() == pytest.approx(mse.item(), rel=1e-12)
        assert terms[f"s{stride}_response"].item() == 0
    for stride in loss.strides:
        both = torch.cat([student["fpn"][stride], teacher["fpn"][stride]], 1)
        assert torch.equal(loss.fusions[str(stride)](both), teacher["fpn"][stride])


def test_who_learns_from_which_term():
    student, teacher = (harness.leaves(x) for x in pair((8,), 2, 3))
    loss = harness.awake(harness.bound(kd(), student, teacher))
    terms = loss(harness.batch(student, teacher, BOXES))
    owners = dict(
        student=student["fpn"].values(),
        teacher=teacher["fpn"].values(),
        adapter=loss.adapters["8"].parameters(),
        fusion=loss.fusions["8"].parameters(),
        classifier=loss.classifiers["8"].parameters(),
    )
    owners = {name: [*tensors] for name, tensors in owners.items()}
    assert harness.learners(terms["s8_fit"], **owners) == {"fusion", "classifier"}
    for term in ("s8_feature", "s8_response"):
        assert harness.learners(terms[term], **owners) == {"student", "adapter"}


def test_gradients():
    student, teacher = pair((16,), 2, 3, padded=(32, 48))
    loss = harness.awake(harness.bound(kd(), student, teacher))
    options = dict(boxes=BOXES, sizes=[(32, 48), (17, 30)])
    harness.check_who_learns(loss, student, teacher, **options)
    harness.check_who_learns(loss, student, teacher)  # no boxes at all

    def taught(s):  # without the fit: its student is detached on purpose, as the targets are
        terms = loss(harness.batch({"fpn": {16: s}}, teacher, **options))
        return terms["s16_feature"] + terms["s16_response"]

    # Targets follow the student where gradcheck moves it; with the fusion's share of the student at
    # zero they stand still, and numeric and analytic gradients have to agree.
    with torch.no_grad():
        loss.fusions["16"].weight[:, :2].zero_()
    assert torch.autograd.gradcheck(taught, [student["fpn"][16].clone().requires_grad_()])
