"""CrossKD: the teacher's head on the student's maps, and how its predictions are compared."""

import copy

import pytest
import tiny
import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from losses.harness import CLASSES, batch, bound, detector, matched, same
from losses.test_bckd import anchor_by_anchor, foreground_of
from losses.test_dkd import kl, softmax
from torch import nn

from sharedkd import ConfigError, FrozenTeacher, Stage
from sharedkd.losses import CrossKD, RegionCrossKD
from sharedkd.losses.base import Regions
from sharedkd.modeling.heads import DenseHead

SIZES = [(40, 90), (64, 96)]  # the first ends within the padding


def test_value():
    """`batch` says that the teacher's head makes the student's logits and boxes of its maps."""
    crossed, teacher = (detector((8, 16), 3, seed=seed) for seed in (0, 10))
    labels, expected = matched(crossed)["labels"], {}
    levels = anchor_by_anchor(crossed, teacher, labels, SIZES)
    for stride, q, p, entropy, apart, label, inside in levels:
        foreground = inside & (label >= 0) & (label < CLASSES)
        score, boxes = ((p - q) ** 2 * entropy).sum(2)[inside].sum(), apart[foreground].sum()
        expected[f"s{stride}_score"] = 0.7 * score / foreground_of(labels)
        expected[f"s{stride}_overlap"] = 1.3 * boxes / foreground_of(labels)
    loss = bound(CrossKD(score=0.7, overlap=1.3), crossed, teacher)
    same(loss(batch(crossed, teacher, sizes=SIZES, labels=labels)), expected)


def pair(kind, teacher=None, **options):
    """A student of a kind with CrossKD's form for it; ``teacher``: another than one of the same kind."""
    teacher = FrozenTeacher(teacher or tiny.detector(kind, seed=1), "", "RGB")
    two_stage = kind.endswith("rcnn")
    weights = dict(score=1.0, **{"box" if two_stage else "overlap": 1.0})
    loss = (RegionCrossKD if two_stage else CrossKD)(**weights, **options)
    return tiny.pair({"x": Stage(loss)}, kind, teacher), loss


def step(model, loss):
    """A step's losses and the batch that the loss has seen."""
    seen = []
    handle = loss.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    losses = tiny.step(model, tiny.batch("half"), {"x": 1.0})
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


def test_a_cascade_that_is_its_teacher_has_nothing_to_learn():
    model, loss = pair("cascade_mask_rcnn")
    model.student.load_state_dict(model.teacher.model.state_dict())
    for module in model.student.modules():  # as the teacher's: no batch statistics
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    losses, _ = step(model, loss)
    found = [x.item() for k, x in losses.items() if k.startswith("distill/")]
    assert len(found) == 2 and max(found) < 1e-3


# --- two-stage --------------------------------------------------------------------------------


@pytest.mark.parametrize("agnostic", [False, True])
def test_value_of_regions(agnostic):
    """Three classes and background, which has no box; with deltas of each class, or of all alike."""
    draw = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 5, 4, generator=draw, dtype=torch.float64)
    columns = 4 if agnostic else 12
    d_c, d_t = torch.randn(2, 5, columns, generator=draw, dtype=torch.float64)
    labels = [0, 3, 2, 1, 2]
    score = sum(kl(softmax(t), softmax(c)) for c, t in zip(ours.tolist(), theirs.tolist()))
    box = 0.0
    for r, label in enumerate(labels):
        first = 0 if agnostic else 4 * label
        if label != 3:
            box += sum(abs(d_c[r, first + i].item() - d_t[r, first + i].item()) for i in range(4))
    regions = Regions(torch.tensor(labels), theirs, theirs, d_t, crossed=lambda left: (ours, d_c))
    loss = RegionCrossKD(score=0.7, box=1.3)
    found = loss(batch({"fpn": {8: ours}}, {"fpn": {8: ours}}, boxes=[[]] * 5, regions=regions))
    same(found, {"score": 0.7 * score / 5, "box": 1.3 * box / 5})


@pytest.mark.parametrize("left", [0, 1, 2])
def test_the_rest_of_the_teachers_box_head_runs_on_the_students_regions(left):
    """Two linear layers, each with a ReLU; the regions are those that the student's head has seen."""
    model, loss = pair("faster_rcnn", left=left)
    ours, theirs, pooled = model.student.roi_heads, model.teacher.model.roi_heads, []
    ours.box_pooler.register_forward_hook(lambda module, args, out: pooled.append((args[1], out)))
    _, given = step(model, loss)
    ((boxes, x),) = pooled
    heads = [(ours, n) for n in range(1, 3 - left)] + [(theirs, n) for n in range(3 - left, 3)]
    x = x.flatten(1)
    for heads_, n in heads:
        x = getattr(heads_.box_head, f"fc{n}")(x).relu()
    logits, deltas = given.regions.crossed(left)
    assert torch.allclose(logits, theirs.box_predictor.cls_score(x), atol=1e-5)
    assert torch.allclose(deltas, theirs.box_predictor.bbox_pred(x), atol=1e-5)
    # The teacher's own: its head on its maps there.
    maps = [given.teacher["fpn"][s] for s in (4, 8, 16, 32)]
    own = theirs.box_predictor(theirs.box_head(theirs.box_pooler(maps, boxes)))
    assert torch.allclose(given.regions.teacher, own[0], atol=1e-5)
    assert torch.allclose(given.regions.deltas, own[1], atol=1e-5)


def test_who_learns_of_regions():
    """In a whole step: the layer before the cut and what is below; not those after it, nor the teacher."""
    model, loss = pair("faster_rcnn")
    before = copy.deepcopy(model.teacher.model.state_dict())
    losses, _ = step(model, loss)
    terms = {k: x for k, x in losses.items() if k.startswith("distill/")}
    assert set(terms) == {"distill/x/score", "distill/x/box"} and min(terms.values()) > 0
    assert len(losses) > len(terms)  # the detector's own
    sum(terms.values()).backward()
    heads = model.student.roi_heads
    assert heads.box_head.fc1.weight.grad.any()
    after_it = [*heads.box_head.fc2.parameters(), *heads.box_predictor.parameters()]
    after_it += [*model.student.proposal_generator.parameters()]
    assert all(p.grad is None for p in after_it)
    assert any(p.grad is not None and p.grad.any() for p in model.student.backbone.parameters())
    assert all(p.grad is None for p in model.teacher.model.parameters())
    after = model.teacher.model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


# --- heads that do not fit --------------------------------------------------------------------


def retinanet():
    node = tiny.node("retinanet")
    node.head.conv_dims = [64, 64]
    return instantiate(node)


def faster_rcnn(size=7, width=256):
    node = tiny.node("faster_rcnn")
    node.roi_heads.box_pooler.output_size = size
    heads = node.roi_heads
    heads.box_head.update(
        input_shape=ShapeSpec(channels=128, height=size, width=size), fc_dims=[width, width]
    )
    heads.box_predictor.input_shape = ShapeSpec(channels=width)
    return instantiate(node)


AT = "model.stages.x.loss"


@pytest.mark.parametrize(
    "kind, teacher, options, start, words",
    [
        ("retinanet", retinanet, {}, f"{AT}.left=1: leaves maps of 128 channels", "on with 64"),
        ("retinanet", None, dict(left=3), f"{AT}.left=3: ", "the student's 2"),
        (
            "faster_rcnn",
            lambda: faster_rcnn(width=64),
            {},
            f"{AT}.left=1: leaves maps of 256 channels in",
            "on with 64 channels; use heads of one width",
        ),
        (
            "faster_rcnn",
            lambda: faster_rcnn(size=5),
            dict(left=2),
            f"{AT}.left=2: leaves maps of 6272 channels (regions of 7x7)",
            "on with 3200 channels (regions of 5x5)",
        ),
        ("faster_rcnn", None, dict(left=3), f"{AT}.left=3: ", "the student's 2"),
        (
            "faster_rcnn",
            lambda: tiny.detector("retinanet"),
            {},
            f"{AT}=RetinaNet: is a teacher without a box head",
            "",
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused(kind, teacher, options, start, words):
    with pytest.raises(ConfigError) as error:
        pair(kind, teacher and teacher(), **options)
    message = str(error.value)
    assert message.startswith(start) and words in message and "\n" not in message


def test_regions_of_another_size_fit_after_a_linear_layer():
    model, loss = pair("faster_rcnn", faster_rcnn(size=5))
    losses, _ = step(model, loss)
    assert all(losses[f"distill/x/{term}"].isfinite() for term in ("score", "box"))
