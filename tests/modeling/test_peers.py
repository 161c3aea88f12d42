"""Students that train together: each learns by itself and from the others, and nothing else does."""

import re

import pytest
import tiny
import torch

from sharedkd import (
    ConfigError,
    CrossLayer,
    IdenticalLayer,
    SharedKDTrainer,
    Stage,
)
from sharedkd.losses import DKD, CrossKD, DenseDKD
from sharedkd.modeling.snapshot import without_trace
from sharedkd.modeling.stages import own_losses
from sharedkd.modeling.teachers import Peer
from sharedkd.weights.loading import fingerprint


def maps(teacher=None, weight=1.0, **options):
    return Stage(IdenticalLayer(strides=[8, 16]), weight, teacher=teacher, **options)


def pair(stages, peer_stages, family="retinanet", peer_family="retinanet", teacher=None):
    peer = Peer(tiny.detector(peer_family, seed=1), peer_stages)
    return tiny.pair(stages, family, teacher, peers={"other": peer})


def reached(loss, model):
    """Whether a loss has a gradient at the first student, and at its peer."""
    found = []
    for student in (model.student, model.peers["other"].student):
        params = [p for p in student.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        found.append(any(x is not None and bool(x.any()) for x in gradients))
    return tuple(found)


@pytest.mark.parametrize("other", ["retinanet", "mask_rcnn"])
def test_each_student_is_reached_by_its_own_losses_alone(other):
    teacher = tiny.frozen("retinanet", seed=2)
    before = fingerprint(teacher.model)
    stages = {"mutual": maps("other"), "frozen": maps()}
    model = pair(stages, {"back": maps()}, peer_family=other, teacher=teacher)
    losses = tiny.step(model)
    names = {"distill/mutual/s8", "distill/frozen/s16", "peer/other/distill/back/s8"}
    assert names | {"loss_cls", "peer/other/loss_cls"} <= losses.keys()
    for owner, expected in (("", (True, False)), ("peer/other/", (False, True))):
        terms = [x for k, x in losses.items() if k.startswith(f"{owner}distill/")]
        own = own_losses(losses, owner)
        assert reached(sum(terms), model) == reached(sum(own), model) == expected
    sum(losses.values()).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert fingerprint(teacher.model) == before


def test_each_runs_once_and_sees_the_others_maps_of_this_step():
    model = pair({"mutual": maps("other")}, {"back": maps()})
    students = (model.student, model.peers["other"].student)
    own, read = [[], []], [[], []]
    for student, outputs in zip(students, own):
        student.backbone.register_forward_hook(lambda m, x, out, seen=outputs: seen.append(out))
    for loss, batches in zip((model.losses["mutual"], model.peers["other"].losses["back"]), read):
        loss.register_forward_pre_hook(lambda m, x, seen=batches: seen.append(x[0]))
    tiny.step(model)
    for me, other in ((0, 1), (1, 0)):
        (batch,), (mine,), (theirs,) = read[me], own[me], own[other]
        for level, stride in (("p3", 8), ("p4", 16)):
            assert batch.student["fpn"][stride] is mine[level]
            assert torch.equal(batch.teacher["fpn"][stride], theirs[level])
            assert not batch.teacher["fpn"][stride].requires_grad
    weights = {"mutual": 0.0, "peer/other/back": 2.0}  # one may teach without learning
    assert {k for k in tiny.step(model, None, weights) if "distill" in k} == {
        "peer/other/distill/back/s8",
        "peer/other/distill/back/s16",
    }


@pytest.mark.parametrize(
    "family, loss", [("retinanet", DenseDKD), ("fcos", DenseDKD), ("faster_rcnn", DKD)]
)
def test_class_scores_teach_too(family, loss):
    stages = [{"dkd": Stage(loss(alpha=1.0, beta=1.0), 1.0, teacher=x)} for x in ("other", None)]
    model = pair(*stages, family, family)
    buffers = {k: x.clone() for k, x in model.named_buffers()}
    with without_trace(model):
        losses = tiny.step(model)
        for name in ("distill/dkd/", "peer/other/distill/dkd/"):
            terms = sum(x for k, x in losses.items() if k.startswith(name))
            assert reached(terms, model) == (name[0] == "d", name[0] == "p")
    assert all(torch.equal(x, buffers[k]) for k, x in model.named_buffers())
    assert all(x.training for x in model.modules())


def trained(model, steps=2, **options):
    """The bytes of each student's tensors, the last step's log, and the trainer."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batches = iter([[tiny.record(48, 64, seed=i)] for i in range(2 * steps)])
    trainer = SharedKDTrainer(model, batches, sgd, max_iter=steps, seed=0, **options)
    with torch.jit.optimized_execution(False):
        trainer.train(0, steps)
    students = trainer.detectors
    states = {
        k: [v.numpy().tobytes() for v in x.state_dict().values()] for k, x in students.items()
    }
    return states, {k: v for k, (v, _) in trainer.storage.latest().items()}, trainer


@pytest.fixture
def one_thread():
    """Two threads on a busy machine round differently from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_without_weights_they_equal_two_runs_byte_for_byte():
    family, other, options = "faster_rcnn", "retinanet", dict(clip_grad_norm=1.0, accumulate=2)
    model = pair({"mutual": maps("other", 0.0)}, {"back": maps(None, 0.0)}, family, other)
    states, log, together = trained(model, **options)
    for owner, alone in (
        ("", tiny.detector(family)),
        ("peer/other/", tiny.detector(other, seed=1)),
    ):
        expected, its_log, run = trained(alone, **options)
        assert states[owner] == expected[""]
        for name, value in its_log.items():
            if "loss" in name:
                assert log[f"{owner}{name}"] == value, name
        student = together.detectors[owner]
        assert getattr(student, "loss_normalizer", 0) == getattr(alone, "loss_normalizer", 0)


def test_sums_are_of_the_students_own_losses():
    model = pair({"mutual": maps("other", 0.5)}, {"back": maps(None, 2.0)})
    _, log, _ = trained(model, 1)
    for owner, weight in (("", 0.5), ("peer/other/", 2.0)):
        detector = sum(log[f"{owner}{x}"] for x in ("loss_cls", "loss_box_reg"))
        (stage,) = [x for k, x in log.items() if k.startswith(f"{owner}loss_distill_")]
        raw = [x for k, x in log.items() if re.match(rf"{owner}distill/\w+/s\d+$", k)]
        assert len(raw) == 2 and stage == pytest.approx(weight * sum(raw))
        assert log[f"{owner}total_loss"] == pytest.approx(detector + stage)
    assert not any(k.startswith(("distill/back", "loss_distill_back")) for k in log)


def test_mixed_precision():
    model = pair({"mutual": maps("other")}, {"back": maps()})
    for name, p in model.named_parameters():
        # PyTorch's gradient of this convolution in bfloat16 is not initialised where its map is 1x1.
        p.requires_grad_(p.requires_grad and "top_block.p7" not in name)
    _, log, trainer = trained(model, 1, amp_dtype=torch.bfloat16)
    assert all(x == x and abs(x) < 1e4 for x in log.values())
    with torch.autocast("cpu", torch.bfloat16):
        terms = {k: x for k, x in tiny.step(trainer.module).items() if "distill" in k}
    assert len(terms) == 4 and all(x.dtype == torch.float32 for x in terms.values())


def test_a_measurement_leaves_no_trace_in_any_student():
    _, _, trainer = trained(pair({"mutual": maps("other")}, {}), 1)
    before = [x.loss_normalizer for x in trainer.detectors.values()]
    with without_trace(trainer.module):
        trainer.repeat(trainer.step, trainer.step.batches[0])
        assert [x.loss_normalizer for x in trainer.detectors.values()] != before
    assert [x.loss_normalizer for x in trainer.detectors.values()] == before


def test_what_cannot_be_a_peer_is_refused():
    student, teachers = tiny.detector("retinanet"), {"large": tiny.frozen()}

    def refused(match, stages=None, **peers):
        with pytest.raises(ConfigError, match=match):
            tiny.pair(stages or {}, student, None, teachers=teachers, peers=peers)

    peer = Peer(tiny.detector("retinanet", seed=1))
    refused("^model.peers.other=RetinaNet: is no Peer; use L.Peer.", other=peer.student)
    refused("^model.peers.large=large: is the name of a teacher", large=peer)
    refused("^model.stages.a.teacher=third: is no source", {"a": maps("third")}, other=peer)
    late = Peer(peer.student, {"b": maps(end="teacher")})
    refused("^model.peers.other.stages.b.end=teacher: a peer is not evaluated", other=late)
    unknown = Peer(peer.student, {"b": maps("large")})
    refused("^model.peers.other.stages.b.teacher=large: is no source of maps", other=unknown)
    alone = Peer(peer.student, {"b": Stage(CrossLayer(tap="backbone"), -1.0)})
    refused("^model.peers.other.stages.b.weight=-1.0", other=alone)
    crossed = Peer(peer.student, {"b": Stage(CrossKD(score=1.0, overlap=1.0))})
    refused("^model.peers.other.stages.b.teacher=None: is a student that trains", other=crossed)
    with pytest.raises(ConfigError, match="^lr_factor=0"):
        Peer(peer.student, lr_factor=0)
