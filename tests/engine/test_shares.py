"""The watchdog: what it measures, when it barks, and that nobody but the log notices."""

import hashlib
import re

import pytest
import tiny
import torch
import torch.distributed as dist
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils.events import EventStorage
from torch import nn
from two import in_two

from sharedkd import (
    ConfigError,
    CrossLayer,
    IdenticalLayer,
    SharedKDTrainer,
    Stage,
)
from sharedkd.engine.hooks.shares import Watchdog, gradient_norms
from sharedkd.engine.trainer import Step
from sharedkd.errors import RunError
from sharedkd.losses.base import DistillationLoss
from sharedkd.modeling.backbones import recompute_blocks


def records(seed=1):
    full = tiny.record(32, 64, ((4, 4, 28, 28), (20, 2, 60, 30)), seed=seed)
    return [tiny.record(48, 32, (), seed=seed + 1), full]  # the one with objects is looked at


def shared_kd(**options):
    return {
        "identical": Stage(IdenticalLayer(strides=[8, 16]), weight=2.0, **options),
        "cross": Stage(CrossLayer(tap="backbone", direction="mutual"), weight=0.1),
    }


def trainer_of(model, count=1, period=0, batches=None, **options):
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    batches = batches or [records(2 * i) for i in range(count * options.get("accumulate", 1))]
    trainer = SharedKDTrainer(model, batches, sgd, max_iter=count, seed=0, **options)
    trainer.register_hooks([Watchdog(period) if period else None])
    return trainer


def measured(stages):
    """gradient_norms of an untrained pair, on records()[1]."""
    trainer = trainer_of(tiny.pair(stages).train())
    return gradient_norms(trainer, records()[1:])


@pytest.fixture(scope="module")
def norms():
    return measured(shared_kd())


def test_norms_are_those_of_backward(norms):
    """The same from the gradients that backward() leaves, one loss and one model at a time."""
    weights = {"identical": 2.0, "cross": 0.1}
    names = [
        k for k in tiny.step(tiny.pair(shared_kd()), records()[1:], weights) if "distill/" in k
    ]
    assert norms.keys() == {"detector", *(name[len("distill/") :] for name in names)}
    cross = next(name for name in norms if name.startswith("cross/"))
    for name in ("detector", "identical/s16", cross):
        model = tiny.pair(shared_kd())
        losses = tiny.step(model, records()[1:], weights)
        chosen = [
            x
            for key, x in losses.items()
            if key == f"distill/{name}" or (name == "detector" and "/" not in key)
        ]
        sum(chosen).backward()
        grads = [p.grad.flatten() for p in model.student.parameters() if p.grad is not None]
        assert norms[name] == pytest.approx(torch.cat(grads).double().norm().item(), rel=1e-5), name


def test_shares_are_logged_when_they_are_measured():
    trainer = trainer_of(tiny.pair(shared_kd()), 4, period=2)
    trainer.train(0, 4)
    shares = {k: h.values() for k, h in trainer.storage.histories().items() if "watch/" in k}
    assert {"watch/detector", "watch/identical/s8", "watch/identical/s16"} < shares.keys()
    assert all([i for _, i in values] == [1, 3] for values in shares.values())
    for i in (0, 1):
        assert sum(values[i][0] for values in shares.values()) == pytest.approx(1)


class Fixed(DistillationLoss):
    """One term, made of the student's map of stride 8."""

    needs = frozenset()

    def __init__(self, term):
        super().__init__(strides=[8])
        self.term = term
        self.own = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {"s8": self.term(batch.student["fpn"][8], self.own)}


TERMS = {
    "huge": lambda s, own: 1e6 * s.square().mean() + 0 * own,
    "small": lambda s, own: 1e-6 * s.square().mean() + 0 * own,
    "zero": lambda s, own: (0 * s).sum() + 0 * own,
    "constant": lambda s, own: s.detach().sum(),
    "own": lambda s, own: own * s.detach().square().mean(),  # as of a discriminator
}


def barks(log):
    return list(dict.fromkeys(x.message for x in log.records if "Watchdog" in x.message))


def watched(trainer, shares, monkeypatch):
    """A watchdog that finds the given shares of mine/s8 in turn; None: the stage is off."""
    dog = Watchdog(10)
    dog.trainer, trainer.step = trainer, Step(0, {}, batches=[records()])
    with EventStorage(0) as trainer.storage:
        for i, share in enumerate(shares):
            trainer.iter = 10 * i + 9
            found = {
                "detector": 1.0 - (share or 0),
                **({} if share is None else {"mine/s8": share}),
            }
            monkeypatch.setattr(
                "sharedkd.engine.hooks.shares.gradient_norms", lambda *_, x=found: x
            )
            dog.after_step()


@pytest.fixture(scope="module")
def mine():
    return trainer_of(tiny.pair({"mine": Stage(Fixed(TERMS["small"]), weight=3.0)}))


@pytest.mark.parametrize(
    "shares, says",
    [
        ([0.95] * 6, r"has 95 % of the student's gradient.*lower model.stages.mine.weight, now 3$"),
        ([0.86, 0.95, 0.95] * 2, r"has 92 % of the student's gradient norm"),
    ],
)
def test_a_warning_comes_once_a_window(mine, shares, says, sharedkd_log, monkeypatch):
    watched(mine, [*shares, shares[0]], monkeypatch)
    first, second = barks(sharedkd_log)
    assert "iterations 9 to 29: stage mine, term s8 has" in first
    assert "iterations 39 to 59: stage mine, term s8 has" in second
    assert re.search(says, first) and re.search(says, second)


def test_a_term_that_is_zero_is_reported(mine, sharedkd_log, monkeypatch):
    watched(mine, [1e-9, 0.0, 0.0, 0.0], monkeypatch)
    (bark,) = barks(sharedkd_log)
    assert "iterations 19 to 39: stage mine, term s8 has 0 % of the student's" in bark
    assert bark.endswith("model.stages.mine.weight=0")


def test_a_stage_that_never_had_a_gradient_ends_the_run(mine, monkeypatch):
    with pytest.raises(RunError, match="model.stages.mine.loss=Fixed: .* iterations 9 to 29;"):
        watched(mine, [0.0] * 3, monkeypatch)


@pytest.mark.parametrize(
    "shares",
    [
        [0.99, 0.99, 0.7, 0.99, 0.6, 0.99],
        [0, 0, 1e-9, 0, 0, 1e-9],  # now and then is enough to live
        [0, 0, None, 0, 0, None, 0.95, 0.95],  # off in between
    ],
)
def test_no_warning(mine, shares, sharedkd_log, monkeypatch):
    watched(mine, shares, monkeypatch)
    assert not barks(sharedkd_log)


def test_a_term_with_most_of_its_stage_is_named_once(mine, sharedkd_log, monkeypatch):
    """Of 0.3, 0.1 and 0.1 the first is 60 %, of 0.2, 0.2 and 0.1 none is above half."""
    dog = Watchdog(10)
    dog.trainer, mine.step = mine, Step(0, {}, batches=[records()])
    with EventStorage(0) as mine.storage:
        for i, first in enumerate([0.2] * 3 + [0.3] * 8):
            mine.iter = 10 * i + 9
            found = {
                "detector": 0.5,
                "mine/s8": first,
                "mine/s16": 0.5 - first - 0.1,
                "mine/s32": 0.1,
            }
            monkeypatch.setattr(
                "sharedkd.engine.hooks.shares.gradient_norms", lambda *_, x=found: x
            )
            dog.after_step()
    (bark,) = barks(sharedkd_log)
    assert "term s8 has 5" in bark  # a window of 0.2, 0.3 and 0.3: 53 %
    assert bark.endswith(
        "model.stages.mine.weight=auto model.stages.mine.balance=levels sets equal shares for all its terms"
    )


@pytest.mark.parametrize(
    "kind, share", [("huge", 1), ("small", 0), ("zero", 0), ("constant", 0), ("own", None)]
)
def test_what_a_term_gives_the_student(kind, share):
    norms = measured({"mine": Stage(Fixed(TERMS[kind]), weight=3.0)})
    if share is None:  # nothing, by construction: neither small nor dead
        assert norms["mine/s8"] is None
    else:
        assert norms["mine/s8"] / sum(norms.values()) == pytest.approx(share, abs=1e-3)
        assert (norms["mine/s8"] == 0) == (kind in ("zero", "constant"))


@pytest.mark.parametrize(
    "period, length, expected",
    [(1000, 90_000, 1000), (1000, 450, 112), (1000, 60, 20), (7, 450, 7), (1000, 4000, 1000)],
)
def test_a_short_run_is_looked_at_as_well(period, length, expected):
    assert Watchdog(period, length).period == expected


def test_a_period_that_is_none():
    with pytest.raises(ConfigError, match="train.watch_period=-1"):
        Watchdog(-1)


def outcome(trainer, count):
    """Weights, momentum, statistics, and the log, after training."""
    # The JIT rounds a scripted loss in another way once it has warmed up.
    with torch.jit.optimized_execution(False):
        trainer.train(0, count)
    momentum = [s["momentum_buffer"] for s in trainer.optimizer.state.values()]
    tensors = [*trainer.module.state_dict().values(), *momentum]
    log = {
        k: h.values()
        for k, h in trainer.storage.histories().items()
        if not k.startswith("watch/") and "time" not in k
    }
    watched = any(k.startswith("watch/") for k in trainer.storage.histories())
    normalizer = getattr(trainer.detector, "loss_normalizer", None)
    digest = hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in tensors)).hexdigest()
    return digest, log, normalizer, watched


@pytest.mark.parametrize(
    "family, options, recompute",
    [
        ("faster_rcnn", {}, False),  # samples at random
        ("retinanet", dict(accumulate=2, clip_grad_norm=1.0), False),
        ("faster_rcnn", dict(amp_dtype=torch.bfloat16), True),
    ],
)
def test_training_is_the_same_to_the_bit(family, options, recompute):
    outcomes = []
    for period in (0, 1):
        model = tiny.pair(shared_kd(), family)
        if recompute:
            recompute_blocks(model.student)
        outcomes.append(outcome(trainer_of(model, 2, period, **options), 2))
    assert outcomes[0][:3] == outcomes[1][:3]
    assert [x[3] for x in outcomes] == [False, True]


def in_group():
    outcomes = []
    for period in (0, 1):
        model = tiny.pair({"identical": Stage(IdenticalLayer(strides=[8]))})
        model = create_ddp_model(model, device_ids=None, broadcast_buffers=False)
        own = [records(9 * dist.get_rank() + i)[1:] for i in range(2)]
        trainer = trainer_of(model, 2, period, own)  # measures before the second step
        outcomes.append(outcome(trainer, 2))
    shares = trainer.storage.history("watch/detector").values()
    return outcomes, shares


def test_two_processes_train_the_same_to_the_bit(tmp_path):
    shares = []
    for (without, watched), share in in_two(in_group, tmp_path):
        assert without[:3] == watched[:3] and watched[3] and not without[3]
        shares.append(share)
    assert shares[0] == shares[1]  # one figure for all
