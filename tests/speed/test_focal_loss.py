"""The focal loss in one pass: the formula's numbers and gradients, in Detectron2's own detectors."""

import copy
import math
import pickle

import pytest
import tiny
import torch
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sharedkd.speed import focal_loss
from sharedkd.speed.focal_loss import sigmoid_focal_loss, use_one_pass


def by_the_paper(x, target, alpha, gamma):
    """Sum of -alpha_t (1 - p_t)^gamma log(p_t), as equation 5 has it."""
    sign = 2 * target - 1
    missed = torch.sigmoid(-sign * x)  # 1 - p_t
    weight = alpha * target + (1 - alpha) * (1 - target) if alpha >= 0 else 1
    return (-weight * missed**gamma * nn.functional.logsigmoid(sign * x)).sum()


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from([(0, 3), (1, 1), (7, 3), (2, 5, 4)]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    alpha=st.sampled_from([-1, 0.0, 0.25, 0.9]),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2, 3.0]),
    block=st.sampled_from([4, 2**17]),
    seed=st.integers(0, 2**16),
)
def test_the_papers_numbers(shape, scale, alpha, gamma, block, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw, dtype=torch.float64) * scale
    target = (torch.rand(shape, generator=draw) < 0.3).double()
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(focal_loss, "BLOCK", block)
        for loss in (by_the_paper, lambda *args: sigmoid_focal_loss(*args, reduction="sum")):
            leaf = x.clone().requires_grad_()
            value = loss(leaf, target, alpha, gamma)
            found.append([value, *torch.autograd.grad(3 * value, leaf)])
    for expected, each in zip(*found):
        torch.testing.assert_close(each, expected, rtol=1e-8, atol=1e-8)  # softplus is x beyond 20


def test_values_by_hand():
    x = torch.zeros(2, requires_grad=True)
    loss = sigmoid_focal_loss(x, torch.tensor([1.0, 0.0]), 0.25, 2, "sum")
    assert loss.item() == pytest.approx((0.25 + 0.75) * 0.5**2 * math.log(2))
    loss.backward()
    # d/dz s^2 softplus(z) at 0: 0.25 (2 * 0.5 * log 2 + 0.5)
    slope = 0.25 * (math.log(2) + 0.5)
    assert x.grad.tolist() == pytest.approx([-0.25 * slope, 0.75 * slope])


def test_16_bits_are_summed_in_32():
    x = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    target = torch.zeros(3000, 2)
    target[::7] = 1
    loss = sigmoid_focal_loss(leaf, target, 0.25, 2, "sum")
    expected = by_the_paper(exact, target.double(), 0.25, 2)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(
        gradient.double(), *torch.autograd.grad(expected, exact), rtol=1e-2, atol=0
    )


def test_a_map_that_is_not_contiguous():
    x, target = torch.randn(3, 5, dtype=torch.float64).t().requires_grad_(), torch.eye(5, 3)
    found = sigmoid_focal_loss(x, target, 0.25, 2, "sum")
    expected = by_the_paper(x, target, 0.25, 2)
    torch.testing.assert_close(found, expected)
    for each in zip(*(torch.autograd.grad(loss, x) for loss in (found, expected))):
        torch.testing.assert_close(*each)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_seen(number, target):
    x = torch.tensor([0.5, number])
    assert not sigmoid_focal_loss(x, torch.tensor([0.0, target]), 0.25, 2, "sum").isfinite()


@pytest.mark.parametrize("shape", [(5, 1), (9,), (4, 3)])
def test_a_target_for_each_logit(shape):
    with pytest.raises(ValueError, match="targets"):
        sigmoid_focal_loss(torch.zeros(5, 3), torch.zeros(shape), 0.25, 2, "sum")


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_other_reductions_are_fvcores(reduction):
    x, target = torch.randn(4, 3), torch.eye(4, 3)
    found = sigmoid_focal_loss(x, target, 0.25, 2, reduction)
    assert found.shape == ((4, 3) if reduction == "none" else ())
    total = found.sum() if reduction == "none" else found * 12
    torch.testing.assert_close(total, by_the_paper(x, target, 0.25, 2))


def test_one_map_is_kept_for_the_gradient():
    x, kept = torch.randn(50, 4, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        sigmoid_focal_loss(x, torch.zeros(50, 4), 0.25, 2, "sum")
    assert kept == [(50, 4)]


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_a_detectors_step_is_the_same(family, monkeypatch):
    torch.manual_seed(0)
    plain = tiny.instantiate(tiny.node(family)).train()
    fast = copy.deepcopy(plain)
    assert use_one_pass(fast) == 1
    calls = []
    apply = focal_loss._OnePass.apply
    monkeypatch.setattr(
        focal_loss._OnePass, "apply", lambda *args: calls.append(args[2:]) or apply(*args)
    )
    losses = []
    for model in (plain, fast):
        torch.manual_seed(0)
        with EventStorage(0):
            losses.append(model(tiny.batch()))
        assert len(calls) == (model is fast)
        sum(losses[-1].values()).backward()
    assert calls == [(0.25, 2.0)]
    assert losses[0].keys() == losses[1].keys()
    for name, x in losses[0].items():
        torch.testing.assert_close(losses[1][name], x, rtol=1e-5, atol=1e-6)
    there = dict(fast.named_parameters())
    for name, p in plain.named_parameters():
        torch.testing.assert_close(there[name].grad, p.grad, rtol=1e-3, atol=1e-5)


def test_a_detector_stays_what_it_is():
    model = tiny.instantiate(tiny.node("retinanet"))
    keys = list(model.state_dict())
    assert use_one_pass(nn.Sequential(model)) == 1
    assert isinstance(model, RetinaNet) and type(model).__name__ == "RetinaNet"
    assert list(model.state_dict()) == keys and use_one_pass(model) == 0
    assert type(pickle.loads(pickle.dumps(model))) is type(copy.deepcopy(model)) is type(model)


def test_other_detectors_keep_their_losses():
    class Own(RetinaNet):
        pass

    own = tiny.instantiate(tiny.node("retinanet"))
    own.__class__ = Own
    assert use_one_pass(own) == use_one_pass(tiny.instantiate(tiny.node("faster_rcnn"))) == 0
    assert type(own) is Own
