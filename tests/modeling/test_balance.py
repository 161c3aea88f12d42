"""Weights that set themselves."""

import pytest
import tiny
import torch
from detectron2.config import instantiate
from omegaconf import OmegaConf

from sharedkd import ConfigError, IdenticalLayer, RunError, Stage
from sharedkd.config import shared_kd_stages
from sharedkd.config.methods import with_method
from sharedkd.modeling import balance
from sharedkd.modeling.balance import AutoWeight, AutoWeights
from sharedkd.modeling.recipes import stages_of


@pytest.fixture(autouse=True)
def short_window(monkeypatch):
    monkeypatch.setattr(balance, "WINDOW", 3)


def gradients(slope, share=0.5, **options):
    """Run four steps; the stage's loss is ``slope[i] * x``, the detector's has the gradient (3, 4)."""
    weight, found = AutoWeight("key", share, **options), []
    for factor in slope:
        x = torch.zeros(2, requires_grad=True)
        detector = (torch.tensor([3.0, 4.0]) * x).sum()
        terms = weight({"a": factor * x[0], "b": 2 * factor * x[1]}, detector, [x])
        found.append(torch.autograd.grad(sum(terms.values()), x)[0])
    return weight, found


def test_the_gradient_is_the_share_of_the_detectors():
    """|detector| = 5 and |stage| = sqrt(5) slope: the first step's is half of 5; then medians hold."""
    weight, found = gradients([1.0, 10.0, 2.0, 7.0])
    assert found[0].norm() == pytest.approx(2.5)
    ratio = 0.5 * 5 / 5**0.5
    assert weight.factors[""] == pytest.approx(ratio / 2)  # of ratios 1, 1/10, 1/2
    assert torch.allclose(found[3], ratio / 2 * 7 * torch.tensor([1.0, 2.0]))


def test_every_term_has_the_same_share():
    _, found = gradients([1.0], by_term=True)
    assert torch.allclose(found[0].abs(), torch.full((2,), 2.5 / 2**0.5))


@pytest.mark.parametrize("slope, says", [(1.0, 0), (100.0, 1)])
def test_a_term_that_sets_the_factor_alone_is_named(slope, says, sharedkd_log):
    weight, x = AutoWeight("model.stages.a.weight", 0.5), torch.zeros(2, requires_grad=True)
    for _ in range(4):
        weight({"s8": x[0], "s32": slope * x[1]}, (torch.tensor([3.0, 4.0]) * x).sum(), [x])
    found = [x.message for x in sharedkd_log.records if "is set by term s32" in x.message]
    assert len(found) == says and all("model.stages.a.balance=levels" in x for x in found)


def test_it_is_measured_again_after_some_steps():
    weight, _ = gradients([1.0] * 5 + [4.0] * 3, every=5)
    assert weight.factors[""] == pytest.approx(0.5 * 5 / 5**0.5 / 4)
    weight, _ = gradients([1.0] * 5 + [4.0] * 3)
    assert weight.factors[""] == pytest.approx(0.5 * 5 / 5**0.5)


def test_a_stage_without_a_gradient_ends_the_run():
    with pytest.raises(RunError, match="key=auto: has had no finite gradient above zero"):
        gradients([0.0] * 3)


def test_terms_that_train_what_the_loss_owns_keep_their_weight():
    """Also where they are measured again, and have a gradient at the maps by then."""
    weight, x = AutoWeight("key", 0.5, every=5, by_term=True), torch.zeros(2, requires_grad=True)
    own = torch.ones((), requires_grad=True)
    for step in range(7):
        detector = (torch.tensor([3.0, 4.0]) * x).sum()
        terms = {"a": 2 * x[0], "discriminator": 7 * own + (x[1] if step >= 5 else 0)}
        found = weight(terms, detector, [x])
    assert found["discriminator"] == 7
    assert torch.autograd.grad(found["a"], x)[0].norm() == pytest.approx(2.5)


def test_it_continues_where_it_was_saved():
    whole, _ = gradients([1.0, 10.0, 2.0])
    part, _ = gradients([1.0, 10.0])
    other = AutoWeight("key", 0.5)
    other.load_state_dict(part.state_dict())
    x = torch.zeros(2, requires_grad=True)
    other({"a": 2 * x[0], "b": 4 * x[1]}, (torch.tensor([3.0, 4.0]) * x).sum(), [x])
    assert other.factors == whole.factors and other.steps == 3


def test_a_state_of_other_settings_is_left():
    """As after ``--resume train.force_resume=True`` with another share."""
    part, _ = gradients([1.0, 10.0])
    other = AutoWeights({"pkd": AutoWeight("key", 0.1), "new": AutoWeight("key", 0.1)})
    other.load_state_dict(AutoWeights({"pkd": part, "gone": part}).state_dict())
    assert other["pkd"].steps == other["new"].steps == 0 and not other["pkd"].factors


def test_terms_that_change_end_the_run():
    weight, x = AutoWeight("key", 0.5, by_term=True), torch.zeros(2, requires_grad=True)
    detector = (torch.tensor([3.0, 4.0]) * x).sum()
    weight({"a": x[0]}, detector, [x])
    with pytest.raises(
        RunError, match="key=auto: its terms are a, b, and were a in the step before"
    ):
        weight({"a": x[0], "b": x[1]}, detector, [x])


def test_a_stage_without_a_term_ends_the_run():
    class Nothing(IdenticalLayer):
        def forward(self, batch):
            return {}

    with pytest.raises(RunError, match="model.stages.mine.loss=Nothing: has returned no term"):
        tiny.step(tiny.pair({"mine": Stage(Nothing(strides=[8]), weight=2.0)}))


def pair(**options):
    stage = Stage(IdenticalLayer(strides=[8, 16]), weight="auto", share=0.25, **options)
    return tiny.pair({"identical": stage})


def test_in_a_pair_at_the_students_maps():
    """Measured independently: gradients of the sums at the FPN's outputs, taken by hooks."""
    model = pair()
    grads = {}

    def watch(module, args, maps):
        for name, x in maps.items():
            if name in ("p3", "p4"):
                x.retain_grad()
                grads[name] = x

    model.student.backbone.register_forward_hook(watch)

    def norm(losses, distilled):
        for x in grads.values():
            x.grad = None
        total = sum(v for k, v in losses.items() if k.startswith("distill/") == distilled)
        total.backward(retain_graph=True)
        return torch.stack([x.grad.norm() for x in grads.values()]).norm()

    losses = tiny.step(model)
    assert norm(losses, True) / norm(losses, False) == pytest.approx(0.25, rel=1e-4)


def test_a_constant_level_does_not_set_the_weight_of_the_others():
    """As the coarsest level of a student that starts with a teacher's FPN at another scale."""
    found = []
    for constant in (False, True):
        model = tiny.pair(instantiate(shared_kd_stages()), "faster_rcnn")
        if constant:
            model.student.backbone.fpn_output5.weight.data.zero_()
        tiny.step(model, None, {"identical": 1.0})
        found.append(model.auto_weights["identical"].factors)
    assert found[1]["s32"] < 0.01 * found[0]["s32"]
    for term in ("s4", "s8", "s16"):
        assert found[1][term] == pytest.approx(found[0][term].item(), rel=0.5)


def test_class_scores_of_regions_have_a_gradient_at_the_pyramid():
    """DKD has no levels of its own."""
    stages = with_method(
        OmegaConf.create(
            {"model": {"student": tiny.node("faster_rcnn"), "stages": None}},
            flags={"allow_objects": True},
        ),
        "dkd:auto:0.1",
    ).model.stages
    model = tiny.pair(instantiate(stages), "faster_rcnn")
    tiny.step(model)
    assert 0 < model.auto_weights["dkd"].factors[""] < float("inf")


def test_options_that_do_not_fit():
    for options in (dict(balance="terms"), dict(every=-1), dict(every=49)):
        with pytest.raises(ConfigError):
            pair(**options)
    with pytest.raises(ConfigError, match="use a number, or auto"):
        Stage(IdenticalLayer(), weight="much").check("x")


@pytest.mark.parametrize("name, widths", [("bckd", {27, 36}), ("crosskd", {128}), ("pgd", {128})])
def test_it_is_measured_where_a_stage_learns(name, widths):
    """Not at boxes, which are the deltas in pixels, nor at logits that only say where to look."""
    model = tiny.pair(instantiate(stages_of(f"{name}:auto", "retinanet")))
    seen, weight = [], model.auto_weights[name]
    weight.register_forward_pre_hook(lambda module, args: seen.extend(args[2]))
    tiny.step(model, None, {name: 1.0})
    assert {x.shape[1] for x in seen} == widths and len(seen) == 5 * len(widths)
    assert weight.factors[""] > 0
