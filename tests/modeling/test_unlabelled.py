"""Images without labels: the detector's losses are those of the others, losses of maps those of all."""

import pytest
import tiny
import torch

from sharedkd import ConfigError, IdenticalLayer, Stage
from sharedkd.losses import CWD, FGD, Batch, CrossLayer
from sharedkd.modeling import balance
from sharedkd.modeling.teachers import Peer

BOXES = ((8, 8, 40, 40), (20, 16, 60, 44))
LABELLED = [tiny.record(48, 64, BOXES, seed=1), tiny.record(64, 60, (), seed=2)]


def without_labels(height, width, seed):
    record = tiny.record(height, width, seed=seed)
    del record["instances"]
    return {**record, "unlabelled": True}


OTHERS = [without_labels(64, 64, seed) for seed in (3, 4)] + [without_labels(40, 64, 5)]


def pair(family="faster_rcnn", norm=None, **stages):
    torch.manual_seed(0)
    node = tiny.node(family)
    if norm:
        node.backbone.bottom_up.stem.norm = node.backbone.bottom_up.stages.norm = norm
    return tiny.pair(stages, tiny.instantiate(node), family)


def step(model, records, weight=1.0):
    return tiny.step(model, records, dict.fromkeys(model.stages, weight))


def gradients(model, losses):
    model.zero_grad()
    sum(losses).backward(retain_graph=True)
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def detectors(losses):
    return {k: x for k, x in losses.items() if not k.startswith("distill/")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", ["mask_rcnn", "retinanet"])
def test_the_detectors_losses_and_gradients_are_those_of_the_labelled_images(family):
    """To the bit, with stages off and on; with stages off nothing runs on the others."""
    expected = step(pair(family), LABELLED)
    for weight in (0.0, 1.0):
        plain, model = (pair(family, one=Stage(IdenticalLayer())) for _ in range(2))
        found = step(model, LABELLED + OTHERS, weight)
        assert same(detectors(found), expected)
        wanted = detectors(step(plain, LABELLED, weight))
        assert same(gradients(model, detectors(found).values()), gradients(plain, wanted.values()))
        assert (len(found) > len(expected)) == (weight > 0)
    assert same(step(model, OTHERS[:1] + LABELLED, 0.0), step(plain, LABELLED, 0.0))


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_losses_of_maps_are_the_mean_over_both_parts(norm):
    """Against the student's backbone and the teacher run by hand on each part; gradients, too."""
    losses = dict(identical=IdenticalLayer(), cross=CrossLayer(tap="backbone"))
    model = pair(norm=norm, **{name: Stage(x) for name, x in losses.items()}).train()
    found = step(model, LABELLED + OTHERS)
    terms = {k: x for k, x in found.items() if k.startswith("distill/")}
    assert {k.split("/")[1] for k in terms} == {*losses}
    by_hand = dict.fromkeys(terms, 0.0)
    for records, share in ((LABELLED, 2 / 5), (OTHERS, 3 / 5)):
        student, images = model.student, model.student.preprocess_image(records)
        bottom_up = student.backbone.bottom_up(images.tensor)
        fpn = student.backbone(images.tensor)
        shapes = student.backbone.output_shape()
        maps = {
            "fpn": {shapes[k].stride: x for k, x in fpn.items()},
            "backbone": {
                student.backbone.bottom_up.output_shape()[k].stride: x for k, x in bottom_up.items()
            },
        }
        theirs = model.teacher.features(records, frozenset({"fpn"}), "RGB")
        batch = Batch(maps, theirs, images.image_sizes, records)
        for name, loss in losses.items():
            for term, value in loss(batch).items():
                by_hand[f"distill/{name}/{term}"] += share * value
    assert all(by_hand[k].item() == pytest.approx(x.item(), rel=1e-4) for k, x in terms.items())
    ours, theirs = gradients(model, terms.values()), gradients(model, by_hand.values())
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(
            ours[key], value, rtol=1e-3, atol=1e-4 * value.abs().max().item()
        )


def test_a_loss_of_a_heads_maps_sees_them_and_one_of_boxes_does_not():
    """The mean of equal parts is each of them; the head runs on its own, without labels."""
    stages = dict(logits=Stage(CWD(temperature=1.0, tap="logits")), boxes=Stage(_fgd()))
    model = pair("retinanet", **stages)
    assert model.sees_unlabelled("logits") and not model.sees_unlabelled("boxes")
    again = [{**LABELLED[0], "unlabelled": True}]
    del again[0]["instances"]
    twice, once = step(model, LABELLED[:1] + again), step(model, LABELLED[:1])
    other = step(model, LABELLED[:1] + OTHERS)
    for key in (k for k, x in once.items() if k.startswith("distill/") and x > 0):
        value = once[key]
        torch.testing.assert_close(twice[key], value, rtol=1e-5, atol=0)
        assert torch.equal(other[key], value) == ("/logits/" not in key), key


def _fgd():
    return FGD(foreground=1.0, background=1.0, attention=1.0, global_=1.0)


def test_a_weight_that_sets_itself_is_measured_on_the_labelled_images(monkeypatch):
    monkeypatch.setattr(balance, "WINDOW", 1)
    factors = []
    for records in (LABELLED, LABELLED + OTHERS):
        model = pair(one=Stage(IdenticalLayer(), weight="auto"))
        found = step(model, records)
        factors.append(model.auto_weights["one"].factors[""])
        assert model.auto_weights["one"].steps == 1
    assert factors[0] == factors[1] > 0
    raw = step(pair(one=Stage(IdenticalLayer())), LABELLED + OTHERS)
    for key in (k for k in found if k.startswith("distill/")):
        assert found[key].item() == pytest.approx((factors[0] * raw[key]).item(), rel=1e-5)


def test_under_autocast_all_is_finite_and_every_parameter_learns():
    model = pair("retinanet", one=Stage(IdenticalLayer()))
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model, LABELLED + OTHERS)
    assert all(x.dtype is torch.float32 and x.isfinite() for k, x in found.items() if "/" in k)
    learnt = gradients(model, found.values())
    assert learnt.keys() == {k for k, p in model.named_parameters() if p.requires_grad}


def test_a_record_without_labels_that_is_not_marked_is_refused():
    record = {k: x for k, x in OTHERS[0].items() if k != "unlabelled"}
    with pytest.raises(ConfigError, match="has an image without labels"):
        step(pair(one=Stage(IdenticalLayer())), LABELLED + [record])


def test_peers_learn_from_each_others_maps_of_them():
    """The mean of equal parts is each of them; other images change the terms of both students alone."""

    def model():
        peer = Peer(tiny.detector("retinanet", seed=1), {"back": Stage(IdenticalLayer())})
        stages = {"mutual": Stage(IdenticalLayer(), teacher="b")}
        return tiny.pair(stages, teacher=None, peers={"b": peer})

    again = [{**LABELLED[0], "unlabelled": True}]
    del again[0]["instances"]
    weights = {"mutual": 1.0, "peer/b/back": 1.0}
    once, twice, other = (
        tiny.step(model(), LABELLED[:1] + x, weights) for x in ([], again, OTHERS)
    )
    terms = [k for k in once if "distill/" in k and once[k] > 1e-3]
    assert any(k.startswith("peer/b/") for k in terms) and any(k.startswith("dist") for k in terms)
    for key, value in once.items():
        torch.testing.assert_close(twice[key], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(other[key], value) == (key not in terms), key
