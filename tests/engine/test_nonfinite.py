"""Numbers that go bad, injected at each place: what is said, what is kept from the weights, what goes on."""

import copy
import hashlib
import math
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from two import in_two

from sharedkd import (
    ConfigError,
    IdenticalLayer,
    NonFiniteLossError,
    SharedKDTrainer,
    Stage,
)
from sharedkd.engine.hooks.nonfinite import find_culprits

MARK = 255  # the first pixel of a batch in which something breaks
NAN, INF = math.nan, math.inf


def batch(bad=False, seed=1):
    record = tiny.record(32, 64, ((4, 4, 28, 28),), seed=seed)
    record["image"][:, 0, 0] = MARK if bad else 0
    record["file_name"] = f"{seed}.jpg"
    return [record]


def marked(inputs):
    return inputs[0]["image"][0, 0, 0] == MARK


def spoil(value, x):
    return x + torch.zeros_like(x).flatten().index_fill(0, torch.tensor(0), value).view_as(x)


def break_map(detector, name, value):
    """One element of a pyramid's map becomes bad when the marked image runs through."""

    def hook(module, args, output):
        if args[0][0, 0, 0, 0] > 0:  # the marked pixel is above the mean, others are below
            return {**output, name: spoil(value, output[name])}

    detector.backbone.register_forward_hook(hook)


def break_loss(module, name, value, inputs_of):
    def hook(module, args, output):
        if marked(inputs_of(args[0])):
            return {**output, name: output[name] * value}

    module.register_forward_hook(hook)


def break_gradient(detector, name, value):
    """The gradient alone: every loss is finite."""
    seen = []
    detector.register_forward_pre_hook(lambda module, args: seen.append(marked(args[0])))
    dict(detector.named_parameters())[name].register_hook(lambda g: g * value if seen[-1] else None)


#: place -> (how it is broken, what the message says of it)
PLACES = {
    "teacher map": (
        lambda pair: break_map(pair.teacher.model, "p4", NAN),
        r"distill/identical/s16=nan.*\(teacher's fpn map of stride 16\)",
    ),
    "student map": (
        lambda pair: break_map(pair.student, "p3", INF),
        r"distill/identical/s8=.*\(student's fpn map of stride 8\)",
    ),
    "detector loss": (
        lambda pair: break_loss(pair.student, "loss_box_reg", INF, lambda x: x),
        r"loss_box_reg=inf is not finite;",
    ),
    "distillation term": (
        lambda pair: break_loss(pair.losses["identical"], "s32", NAN, lambda x: x.inputs),
        r"distill/identical/s32=nan is not finite;",
    ),
    "gradient": (
        lambda pair: break_gradient(pair.student, "head.cls_score.weight", INF),
        r"the gradient's norm is (inf|nan), all losses are finite "
        r"\(gradient of student.head.cls_score.weight\)",
    ),
}


def pair(family="retinanet"):
    return tiny.pair({"identical": Stage(IdenticalLayer())}, family)


def trainer_of(model, batches, **options):
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)
    options = {"max_iter": 100, "seed": 0, **options}
    return SharedKDTrainer(model, copy.deepcopy(batches), sgd, **options)


def run(trainer, iterations):
    with EventStorage(0) as trainer.storage:
        for trainer.iter in iterations:
            trainer.before_step()
            trainer.run_step()
    return trainer


def state(trainer):
    """Everything that a step may change, as bytes."""
    momentum = [s["momentum_buffer"] for s in trainer.optimizer.state.values()]
    tensors = [*trainer.module.state_dict().values(), *momentum]
    normalizer = getattr(trainer.detector, "loss_normalizer", None)
    return [x.detach().numpy().tobytes() for x in tensors], normalizer


@pytest.mark.parametrize("place", PLACES)
def test_stop_names_the_place_and_changes_no_weight(place):
    model = pair()
    breaks, says = PLACES[place]
    breaks(model)
    trainer = run(trainer_of(model, [batch(), batch(bad=True)]), [0])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NonFiniteLossError, match=f"^iteration 1: .*{says}.*training stops"):
        run(trainer, [1])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("place", PLACES)
def test_a_skipped_step_leaves_nothing_behind(place, sharedkd_log):
    """Weights, momentum and running statistics are those of a run without that step."""
    breaks, says = PLACES[place]
    model = pair()
    breaks(model)
    batches = [batch(), batch(bad=True), batch(seed=2)]
    trainer = run(trainer_of(model, batches, on_nonfinite="skip_step"), [0, 1, 2])
    other = run(trainer_of(pair(), [batches[0], batches[2]]), [0, 2])
    assert state(trainer) == state(other)
    assert re.search(f"iteration 1: .*{says}.*the step is skipped", sharedkd_log.text)
    assert (trainer.log.in_a_row, trainer.log.total) == (0, 1)
    history = trainer.storage.history("skipped_steps").values()
    assert history == [(0, 0), (1, 1), (1, 2)]
    assert all(
        math.isfinite(x) for h in trainer.storage.histories().values() for x, _ in h.values()
    )


def test_a_detector_that_refuses_its_numbers():
    """Detectron2's RPN raises an error of its own in the middle of the forward."""
    model = pair("faster_rcnn")
    break_map(model.student, "p3", NAN)
    batches = [batch(), batch(), batch(bad=True), batch(seed=2), batch(seed=3), batch(seed=4)]
    trainer = trainer_of(model, batches, on_nonfinite="skip_step", accumulate=2)
    run(trainer, [0, 1, 2])  # the second part of the broken step is consumed all the same
    other = pair("faster_rcnn")
    kept = [*batches[:2], *batches[4:]]
    assert state(trainer) == state(run(trainer_of(other, kept, accumulate=2), [0, 2]))
    trainer = trainer_of(model, [batches[2]])
    says = (
        r"^iteration 0: Predicted boxes.*Inf/NaN.*\(student's fpn map of stride 8\); training stops"
    )
    with pytest.raises(NonFiniteLossError, match=says):
        run(trainer, [0])


def test_what_the_data_loader_delivers_is_named():
    bad = batch(bad=True)
    bad[0]["instances"].gt_boxes.tensor[0, 0] = NAN
    trainer = trainer_of(pair(), [bad])
    with pytest.raises(NonFiniteLossError, match=r"\(ground-truth boxes of image 1.jpg\)"):
        run(trainer, [0])
    bad[0]["image"] = bad[0]["image"] * INF
    trainer = trainer_of(pair(), [bad])
    with pytest.raises(NonFiniteLossError, match=r"\(image 1.jpg; ground-truth boxes of image 1"):
        run(trainer, [0])


def test_weights_that_are_bad_already_are_named():
    model = pair()
    with torch.no_grad():
        model.student.backbone.fpn_output4.weight[0] = NAN
    with pytest.raises(NonFiniteLossError, match="weights: student.backbone.fpn_output4.weight"):
        run(trainer_of(model, [batch()]), [0])


def test_a_good_step_resets_the_count():
    trainer = tiny.toy([NAN, NAN, 1, NAN, INF, 1], on_nonfinite="skip_step", max_skipped_steps=2)
    run(trainer, range(6))
    assert trainer.module.weight == -1
    assert (trainer.log.in_a_row, trainer.log.total) == (0, 4)


@pytest.mark.parametrize("limit", [0, 2])
def test_the_bound_on_skipped_steps(limit):
    options = dict(on_nonfinite="skip_step", max_skipped_steps=limit)
    trainer = run(tiny.toy([1] + [NAN] * 9, **options), range(limit + 1))
    says = (
        f"iteration {limit + 1}: .*{limit} steps in a row.*train.max_skipped_steps={limit}.*stops"
    )
    with pytest.raises(NonFiniteLossError, match=says):
        run(trainer, [limit + 1])
    assert trainer.module.weight == 0


def test_a_resumed_run_keeps_its_count():
    options = dict(on_nonfinite="skip_step", max_skipped_steps=2)
    before = run(tiny.toy([1, NAN, NAN], **options), range(3))
    after = tiny.toy([NAN], **options)
    after.load_state_dict(before.state_dict())
    assert (after.log.in_a_row, after.log.total) == (2, 2)
    with pytest.raises(NonFiniteLossError, match="iteration 3: .*2 steps in a row"):
        run(after, [3])


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(on_nonfinite="ignore"), "train.on_nonfinite=ignore.*stop or skip_step"),
        (dict(max_skipped_steps=-1), "train.max_skipped_steps=-1: is negative"),
    ],
)
def test_wrong_options(options, says):
    with pytest.raises(ConfigError, match=says):
        tiny.toy([1], **options)


# Read late, as on a GPU.


@pytest.mark.parametrize("place", PLACES)
def test_what_is_read_late_does_not_reach_the_weights(place):
    breaks, says = PLACES[place]
    model = pair()
    breaks(model)
    batches = [batch(), batch(bad=True), batch(seed=2)]
    trainer = trainer_of(model, batches, clip_grad_norm=1.0 if place == "gradient" else None)
    trainer.log.period = 20
    run(trainer, [0, 1, 2])
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(NonFiniteLossError, match=f"^iteration 1: .*{says}.*training stops"):
        trainer.state_dict()


def test_a_late_step_moves_by_a_gradient_of_zero():
    trainer = tiny.toy([1, NAN, 3])
    trainer.log.period = 20
    assert run(trainer, range(3)).module.weight == 1 - 1 - 3
    with pytest.raises(NonFiniteLossError, match="iteration 1: loss_toy=nan"):
        trainer.state_dict()
    # A loss may be infinite and its gradient finite.
    trainer = tiny.toy([1])
    trainer.module.register_forward_hook(lambda *x: {"loss_toy": x[-1]["loss_toy"] + INF})
    trainer.log.period = 20
    assert run(trainer, [0]).module.weight == 1


# Float16's scaler.


def scaled(values, scale, **options):
    """Gradients are multiplied by `scale` and overflow in float32, as those of float16 do earlier."""
    trainer = tiny.toy(values, **options)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


@pytest.mark.parametrize("policy", ["stop", "skip_step"])
def test_an_overflow_is_no_bad_step(policy):
    trainer = run(scaled([8], 2.0**126, on_nonfinite=policy), [0])  # 8 * 2**126 is infinite
    assert trainer.module.weight == 1 and trainer.scaler.get_scale() == 2.0**125
    assert trainer.log.total == 0
    assert "grad_norm" not in trainer.storage.latest()
    assert trainer.storage.latest()["loss_toy"][0] == 8
    # A smaller one does not overflow.
    assert run(scaled([8], 2.0**10, on_nonfinite=policy), [0]).module.weight == 1 - 8


def test_a_bad_loss_is_no_overflow():
    with pytest.raises(NonFiniteLossError, match="iteration 0: loss_toy=nan is not finite"):
        run(scaled([NAN], 2.0**10), [0])
    trainer = run(scaled([NAN, 3], 2.0**10, on_nonfinite="skip_step"), [0, 1])
    assert trainer.log.total == 1
    assert trainer.module.weight == 1 - 3 and trainer.scaler.get_scale() == 2.0**10


def test_a_gradient_that_is_bad_without_any_scale_is_no_overflow():
    trainer = scaled([1, 1], 2.0)
    trainer.module.weight.register_hook(lambda gradient: gradient * INF)
    run(trainer, [0])  # may be an overflow: the scale goes down to 1
    with pytest.raises(NonFiniteLossError, match="iteration 1: the gradient's norm is inf"):
        run(trainer, [1])


# Several processes.


def in_group():
    rank, found = dist.get_rank(), {}
    for family in ("retinanet", "faster_rcnn"):
        for policy in ("stop", "skip_step"):
            model = pair(family)
            if rank == 1:  # one rank alone
                break_map(model.student, "p3", NAN)
            batches = [batch(bad=i == 1, seed=1 + rank + 2 * i) for i in range(3)]
            ddp = create_ddp_model(model, device_ids=None, broadcast_buffers=False)
            trainer = trainer_of(ddp, batches, on_nonfinite=policy)
            error = ""
            try:
                run(trainer, range(3))
            except NonFiniteLossError as e:
                error = str(e)
            weights = torch.cat([x.detach().flatten() for x in model.parameters()])
            digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
            finite = torch.isfinite(weights).all().item()
            found[family, policy] = (error, trainer.log.total, trainer.iter, finite, digest)
    return found


def test_all_ranks_decide_alike(tmp_path):
    ranks = in_two(in_group, tmp_path)
    for family in ("retinanet", "faster_rcnn"):
        for policy in ("stop", "skip_step"):
            assert ranks[0][family, policy] == ranks[1][family, policy]
            error, total, last, finite, _ = ranks[0][family, policy]
            assert finite
            if policy == "stop":
                assert re.search(r"iteration 1: .*\(rank 1: student's fpn map of stride 8\)", error)
                assert (total, last) == (0, 1)
            else:
                assert (error, total, last) == ("", 1, 2)


def test_students_with_norms_over_ranks_are_not_run_again(monkeypatch):
    """The other ranks would have to run with them; a peer is a student, too."""
    peer = nn.ModuleDict({"norm": nn.SyncBatchNorm(1)})
    module = nn.ModuleDict({"student": nn.Identity(), "peer": peer})
    trainer = SimpleNamespace(module=module, detector=module["student"])
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    assert find_culprits(trainer, None, together=True) == []
