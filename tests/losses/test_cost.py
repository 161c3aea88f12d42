"""Shared-KD's losses are at most 2 % of a training step, forward and backward."""

from dataclasses import replace
from time import perf_counter

import pytest
import tiny
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from losses import harness

from sharedkd.modeling.balance import held

pytestmark = pytest.mark.nightly


@pytest.mark.parametrize("config", ["faster_rcnn_sharedkd.py", "retinanet_sharedkd.py"])
def test_the_losses_share_of_a_step(config):
    """The published pair, without weights, on two images of 320 pixels."""
    node = tiny.config(config).model
    node.teacher.weights = ""
    model = instantiate(node).train()
    records = [tiny.record(320, 320, seed=i) for i in range(2)]
    for x in records:  # of 80 classes, and no masks
        x["instances"].remove("gt_masks")
    given = []
    for loss in model.losses.values():
        loss.register_forward_pre_hook(lambda module, args: given.append((module, args[0])))

    def step():
        model.zero_grad()
        with EventStorage(0):
            with held(model.auto_weights):  # known, as in all but a run's first steps
                sum(model(records).values()).backward()

    step()
    batches = [
        (
            loss,
            replace(batch, student=harness.leaves({t: batch.student[t].copy() for t in loss.taps})),
        )
        for loss, batch in given
    ]
    for loss in model.losses.values():
        loss._forward_pre_hooks.clear()

    def losses():
        for loss, batch in batches:
            for levels in batch.student.values():
                for x in levels.values():
                    x.grad = None
            sum(loss(batch).values()).backward()

    fastest = {}
    for _ in range(5):  # side by side, so that a busy machine slows down both
        for call in (step, losses):
            start = perf_counter()
            call()
            spent = perf_counter() - start
            fastest[call] = min(spent, fastest.get(call, spent))
    share = fastest[losses] / fastest[step]
    assert share <= 0.02, f"{share:.1%}"
