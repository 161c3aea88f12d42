"""CrossKD: the teacher's head on the student's maps, and how its predictions are compared."""

import copy
import math

import numpy as np
import pytest
import tiny
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from losses.harness import CLASSES, batch, bound, detector, matched, same
from losses.test_bckd import overlap
from torch import nn

from sharedkd import ConfigError, FrozenTeacher, SharedKD, Stage
from sharedkd.losses import CrossKD
from sharedkd.modeling.heads import DenseHead

SIZES = [(40, 90), (64, 96)]  # the first ends within the padding


def test_value():
    """`batch` says that the teacher's head makes the student's logits and boxes of its maps."""
    crossed, teacher = (detector((8, 16), 3, seed=seed) for seed in (0, 10))
    labels, expected = matched(crossed)["labels"], {}
    count = sum(0 <= x < CLASSES for each in labels.values() for x in each.flatten().tolist())
    for stride, each in labels.items():
        score = boxes = 0.0
        for n, a, y, x in np.ndindex(*each.shape):
            height, width = SIZES[n]
            if y * stride >= height or x * stride >= width:
                continue
            for k in range(a * CLASSES, (a + 1) * CLASSES):
                q, p = (
                    1 / (1 + math.exp(-m["logits"][stride][n, k, y, x])) for m in (crossed, teacher)
                )
                score -= (p - q) ** 2 * (p * math.log(q) + (1 - p) * math.log(1 - q))
            if 0 <= each[n, a, y, x] < CLASSES:
                both = (m["boxes"][stride][n, 4 * a : 4 * a + 4, y, x] for m in (crossed, teacher))
                boxes += 1 - overlap(*(b.tolist() for b in both))
        expected[f"s{stride}_score"] = 0.7 * score / count
        expected[f"s{stride}_overlap"] = 1.3 * boxes / count
    loss = bound(CrossKD(score=0.7, overlap=1.3), crossed, teacher)
    same(loss(batch(crossed, teacher, sizes=SIZES, labels=labels)), expected)


def pair(kind, teacher=None, **options):
    teacher = FrozenTeacher(teacher or tiny.detector(kind, seed=1), "", "RGB")
    loss = CrossKD(score=1.0, overlap=1.0, **options)
    model = SharedKD(
        student=tiny.detector(kind), teacher=teacher, stages={"x": Stage(loss)}, input_format="RGB"
    )
    return model.train(), loss


def step(model, loss):
    """A step's losses and the batch that the loss has seen."""
    seen = []
    handle = loss.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(0)
    with EventStorage(0):
        losses = model(tiny.batch("half"), {"x": 1.0})
    handle.remove()
    return losses, seen[0]


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_the_rest_of_the_teachers_head_runs_on_the_students_maps(kind):
    """Two convolutions, each with a ReLU and FCOS's with a norm, in both towers of the small heads."""
    model, loss = pair(kind)
    _, given = step(model, loss)
    ours, theirs = model.student.head, model.teacher.model.head
    head = DenseHead.of(model.teacher.model)
    for left in (0, 1, 2):
        found, deltas = given.crossed(left), {}
        cut = len(ours.cls_subnet) * (2 - left) // 2
        for stride, x in given.student["fpn"].items():
            logits = theirs.cls_score(theirs.cls_subnet[cut:](ours.cls_subnet[:cut](x)))
            deltas[stride] = theirs.bbox_pred(theirs.bbox_subnet[cut:](ours.bbox_subnet[:cut](x)))
            assert torch.allclose(found["logits"][stride], logits, atol=1e-5)
        for stride, boxes in head.boxes(deltas).items():
            assert torch.allclose(found["boxes"][stride], boxes, atol=1e-3)


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_who_learns(kind):
    """What comes before the cut, in both towers; not the student's last layers, nor the teacher."""
    model, loss = pair(kind)
    before = copy.deepcopy(model.teacher.model.state_dict())
    losses, _ = step(model, loss)
    sum(x for k, x in losses.items() if k.startswith("distill/")).backward()
    head = model.student.head
    for tower, last in ((head.cls_subnet, head.cls_score), (head.bbox_subnet, head.bbox_pred)):
        first, second = (x for x in tower if isinstance(x, nn.Conv2d))
        assert first.weight.grad.any()
        assert second.weight.grad is None and last.weight.grad is None
    assert any(p.grad is not None and p.grad.any() for p in model.student.backbone.parameters())
    assert all(p.grad is None for p in model.teacher.model.parameters())
    after = model.teacher.model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    model, loss = pair("retinanet")
    model.student.load_state_dict(model.teacher.model.state_dict())
    for module in model.student.modules():  # as the teacher's: no batch statistics
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    losses, _ = step(model, loss)
    terms = [x.item() for k, x in losses.items() if k.startswith("distill/")]
    assert len(terms) == 10 and max(terms) < 1e-3


def narrow():
    node = tiny.node("retinanet")
    node.head.conv_dims = [64, 64]
    return instantiate(node)


@pytest.mark.parametrize(
    "teacher, options, start, words",
    [
        (narrow, {}, "model.stages.x.loss.left=1: leaves maps of 128 channels", "goes on with 64"),
        (None, dict(left=3), "model.stages.x.loss.left=3: ", "the student's 2"),
    ],
)
def test_heads_that_do_not_fit_are_refused(teacher, options, start, words):
    with pytest.raises(ConfigError) as error:
        pair("retinanet", teacher and teacher(), **options)
    message = str(error.value)
    assert message.startswith(start) and words in message and "\n" not in message


def test_two_stage_detectors_are_refused():
    with pytest.raises(ConfigError, match="assigns no classes to its anchors"):
        pair("faster_rcnn")
