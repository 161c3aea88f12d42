"""What is taken from detectors' heads is what the detectors themselves compute with."""

import pytest
import tiny
import torch
from torch import nn

from sharedkd import ConfigError, DistillationLoss, FrozenTeacher, Stage
from sharedkd.modeling.heads import DenseHead, RegionTap, anchor_labels, region_predictions
from sharedkd.modeling.taps import FeatureTap, common_pixels, pyramid_shapes

HEAD = {"logits", "deltas", "boxes", "anchors"}
TWO_STAGE = [f for f in tiny.FAMILIES if f.endswith("rcnn")]
ONE_STAGE = ["retinanet", "fcos"]
DENSE = ["faster_rcnn", *ONE_STAGE]  # the other two-stage detectors have the same RPN


def owner(detector):
    return getattr(detector, "proposal_generator", detector)


def spy(monkeypatch, target, name):
    """Calls of a method: a list of (arguments, result)."""
    calls, method = [], getattr(target, name)

    def wrapped(*args, **kwargs):
        calls.append((args, method(*args, **kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(target, name, wrapped)
    return calls


@pytest.mark.parametrize("family", DENSE)
def test_dense_outputs_are_the_heads_own(family, monkeypatch):
    model = tiny.detector(family).train()
    head = DenseHead.of(model)
    outputs = []
    head.module.register_forward_hook(lambda m, args, out: outputs.append(out))
    calls = spy(monkeypatch, owner(model), "losses")
    with FeatureTap(model).capture(HEAD) as maps:
        tiny.step(model)
    logits, deltas = outputs[0][:2]
    assert set(maps) == HEAD
    shapes = pyramid_shapes(model)
    for tap, levels in maps.items():
        assert {s: x.shape[1] for s, x in levels.items()} == shapes[tap]
    for stride, z, d in zip(head.strides, logits, deltas):
        assert torch.equal(maps["logits"][stride], z)
        assert torch.equal(maps["deltas"][stride], d)
    # Boxes, one by one: the anchor that the detector's own losses pair with this delta.
    anchors = calls[0][0][0]
    for stride, level in zip(head.strides, anchors):
        n, _, h, w = maps["deltas"][stride].shape
        found = maps["boxes"][stride].view(n, -1, 4, h, w)
        delta = maps["deltas"][stride].view(n, -1, 4, h, w)
        own = maps["anchors"][stride].view(n, -1, 4, h, w)
        a = found.shape[1]
        anchor = level.tensor.view(h, w, a, 4)
        assert found.requires_grad and not own.requires_grad
        for y, x, k in ((0, 0, 0), (h - 1, w - 1, a - 1), (h // 2, w // 3, a // 2)):
            expected = owner(model).box2box_transform.apply_deltas(
                delta[:, k, :, y, x].detach(), anchor[y, x, k].expand(n, 4)
            )
            assert torch.allclose(found[:, k, :, y, x], expected, atol=1e-4)
            assert torch.equal(own[:, k, :, y, x], anchor[y, x, k].expand(n, 4))


# (stride, number, y, x) -> anchor.  Two-stage: one size a level, height / width of 0.5, 1 and 2;
# RetinaNet: these ratios of three sizes, each 2^(1/3) times the one before; both about the upper left
# corner of a position.  FCOS: a square of the stride about the middle of a position.
ANCHORS = {
    "faster_rcnn": {
        (4, 1, 0, 0): (-8, -8, 8, 8),
        (4, 0, 3, 5): (20 - 128**0.5, 12 - 32**0.5, 20 + 128**0.5, 12 + 32**0.5),
        (4, 2, 3, 5): (20 - 32**0.5, 12 - 128**0.5, 20 + 32**0.5, 12 + 128**0.5),
        (64, 1, 0, 1): (-64, -128, 192, 128),
    },
    "retinanet": {
        (8, 1, 1, 2): (8, 0, 24, 16),
        (8, 0, 1, 2): (16 - 128**0.5, 8 - 32**0.5, 16 + 128**0.5, 8 + 32**0.5),
        (8, 4, 1, 2): (
            16 - 2 ** (10 / 3),
            8 - 2 ** (10 / 3),
            16 + 2 ** (10 / 3),
            8 + 2 ** (10 / 3),
        ),
        (32, 1, 1, 0): (-32, 0, 32, 64),
    },
    "fcos": {
        (8, 0, 0, 0): (0, 0, 8, 8),
        (8, 0, 1, 2): (16, 8, 24, 16),
        (32, 0, 1, 2): (64, 32, 96, 64),
    },
}


@pytest.mark.parametrize("family", ANCHORS)
def test_anchors_by_hand(family):
    """Of zeros, not of what a head predicts: the same for both images."""
    head = DenseHead.of(tiny.detector(family))

    def anchors(height, width):
        shape = 2, head.channels["deltas"]
        deltas = {s: torch.zeros(*shape, -(-height // s), -(-width // s)) for s in head.strides}
        found = head.anchors(deltas)
        assert {s: x.shape for s, x in found.items()} == {s: x.shape for s, x in deltas.items()}
        return found

    found = anchors(64, 96)
    for (stride, number, y, x), box in ANCHORS[family].items():
        for image in found[stride]:
            anchor = image[4 * number : 4 * number + 4, y, x]
            assert anchor.tolist() == pytest.approx(box, abs=1e-5), (stride, number, y, x)
    # A teacher that pads more sees the same anchors where the student sees any.
    _, cut = common_pixels({"anchors": found}, {"anchors": anchors(128, 160)})
    cut = cut["anchors"]
    assert all(torch.equal(cut[s], x) for s, x in found.items())


@pytest.mark.parametrize("taps", [{"anchors"}, {"boxes", "deltas"}])
def test_what_is_made_of_deltas_does_not_hand_them_out(taps):
    model = tiny.detector("retinanet").train()
    with FeatureTap(model).capture(taps) as maps:
        tiny.step(model)
    assert set(maps) == taps


@pytest.mark.parametrize("ground_truth", ["half", "empty"])
@pytest.mark.parametrize("family", ONE_STAGE)
def test_labels_are_those_of_the_detectors_losses(family, ground_truth, monkeypatch):
    model = tiny.detector(family).train()
    calls = spy(monkeypatch, model, "label_anchors")
    batch = tiny.batch(ground_truth)
    with FeatureTap(model).capture({"logits"}) as maps:
        tiny.step(model, batch)
    labels = anchor_labels(model, batch, maps["logits"])
    own = torch.stack(calls[0][1][0])
    rows = [x.permute(0, 2, 3, 1).flatten(1) for _, x in sorted(labels.items())]
    assert torch.equal(torch.cat(rows, 1), own)
    assert (own < tiny.CLASSES).any() == (ground_truth != "empty")


@pytest.mark.parametrize(
    "family, ground_truth", [(f, "half") for f in TWO_STAGE] + [("faster_rcnn", "empty")]
)
def test_regions_are_those_of_the_detectors_losses(family, ground_truth, monkeypatch):
    model = tiny.detector(family).train()
    predictor = model.roi_heads.box_predictor
    predictor = predictor[0] if isinstance(predictor, nn.ModuleList) else predictor
    calls = spy(monkeypatch, predictor, "losses")
    batch, tap = tiny.batch(ground_truth), RegionTap(model)
    with FeatureTap(model).capture({"fpn"}) as maps, tap.capture() as found:
        tiny.step(model, batch)
    (scores, _), proposals = calls[0][0]
    assert torch.equal(found["logits"], scores) and found["logits"].requires_grad
    own = torch.cat([p.gt_classes for p in proposals])
    labels = tap.labels(found["boxes"], [x["instances"] for x in batch])
    assert torch.equal(labels, own)
    assert (own < tiny.CLASSES).any() == (ground_truth != "empty")
    # The same heads on the same maps and regions say the same.
    again, _ = region_predictions(model, maps["fpn"], found["boxes"])
    assert torch.allclose(again, scores, atol=1e-5)


class Probe(DistillationLoss):
    """Reads what it is told to need, and keeps it."""

    def __init__(self, needs, taps):
        super().__init__()
        self.needs, self._taps = frozenset(needs), frozenset(taps)

    @property
    def taps(self):
        return self._taps

    def forward(self, batch):
        self.batch = batch
        return {"zero": next(iter(batch.student.values()))[32].sum() * 0.0}


def pair(student, teacher, needs, taps=(), **options):
    probe = Probe(needs, taps)
    teacher = tiny.detector(teacher, seed=1, **options)
    return tiny.pair({"probe": Stage(probe)}, student, FrozenTeacher(teacher, "", "RGB")), probe


@pytest.mark.parametrize("family", DENSE)
def test_the_teachers_dense_head_is_run_if_needed(family):
    model, probe = pair(family, family, {"teacher"}, HEAD)
    batch = tiny.batch()
    tiny.step(model, batch)
    teacher = model.teacher.model
    images = model.teacher.preprocess(batch, "RGB", 32).tensor
    with torch.no_grad():
        head = DenseHead.of(teacher)
        logits, deltas = head.run(teacher.backbone(images))[:2]
    for stride, z, d in zip(head.strides, logits, deltas):
        assert torch.allclose(probe.batch.teacher["logits"][stride], z, atol=1e-5)
        assert torch.allclose(probe.batch.teacher["deltas"][stride], d, atol=1e-5)
        assert probe.batch.teacher["boxes"][stride].shape == d.shape
        both = probe.batch.student["anchors"][stride], probe.batch.teacher["anchors"][stride]
        assert torch.equal(*both)
        assert not probe.batch.teacher["logits"][stride].requires_grad
        assert probe.batch.student["logits"][stride].requires_grad


def test_no_head_of_the_teacher_runs_for_feature_losses():
    model, _ = pair("retinanet", "retinanet", {"teacher"}, {"fpn"})
    model.teacher.model.head.register_forward_hook(lambda *args: pytest.fail("the head ran"))
    tiny.step(model)


@pytest.mark.parametrize("teacher", TWO_STAGE)
def test_regions_through_both_heads(teacher):
    model, probe = pair("mask_rcnn", teacher, {"teacher", "regions"})
    tiny.step(model, tiny.batch("half"))
    regions = probe.batch.regions
    assert regions.student.shape == regions.teacher.shape == (128, tiny.CLASSES + 1)
    assert regions.labels.shape == (128,)
    assert regions.student.requires_grad and not regions.teacher.requires_grad
    assert not torch.equal(regions.student, regions.teacher)


@pytest.mark.parametrize(
    "student, teacher, need, options, words",
    [
        ("retinanet", "mask_rcnn", "regions", {}, "student without a box head"),
        ("mask_rcnn", "retinanet", "regions", {}, "teacher without a box head"),
        ("mask_rcnn", "mask_rcnn", "regions", {"num_classes": 5}, "5 classes of the teacher"),
        ("mask_rcnn", "mask_rcnn", "labels", {}, "no classes"),
    ],
)
def test_heads_that_do_not_fit_are_refused_when_built(student, teacher, need, options, words):
    with pytest.raises(ConfigError, match=words) as error:
        pair(student, teacher, {"teacher", need}, **options)
    assert "model.stages.probe.loss" in str(error.value)


def test_a_detector_without_a_dense_head_has_no_such_taps():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = tiny.detector("retinanet").backbone

    assert DenseHead.of(Bare()) is None
    assert set(pyramid_shapes(Bare())) == {"fpn", "backbone"}
