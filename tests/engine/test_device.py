"""On any device: nothing of a step stays on the CPU, and nothing but the student's own forward waits."""

import copy
import itertools
from collections import Counter

import pytest
import tiny
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from elsewhere import Elsewhere, elsewhere, move

from sharedkd import IdenticalLayer, SharedKDTrainer, Stage
from sharedkd.config import shared_kd_stages
from sharedkd.losses import DKD, FGD, DenseDKD
from sharedkd.losses.base import UNLABELLED
from sharedkd.modeling.laterals import fit_laterals
from sharedkd.modeling.teachers import Peer, StudentAverage, TeacherMean


def stages():
    """Shared-KD's two parts, whose weights set themselves, and a loss that reads the ground truth."""
    found = shared_kd_stages()
    found.cross.weight = "auto"
    return {**instantiate(found), "boxes": Stage(FGD(1.0, 1.0, 1.0, 1.0), 1e-4)}


def one(teacher=None):
    return {"maps": Stage(IdenticalLayer(normalize="instance"), "auto", teacher=teacher)}


def trainer_of(model, records=None, **options):
    params = [p for p in model.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(params, lr=1e-3, momentum=0.9)
    batches = itertools.repeat(records or tiny.batch())
    return SharedKDTrainer(model, batches, sgd, max_iter=100, seed=0, **options)


def test_a_tensor_on_the_cpu_does_not_meet_one_on_the_device():
    x, here = Elsewhere(torch.ones(2)), torch.ones(2)
    with elsewhere():
        with pytest.raises(RuntimeError, match="on the CPU"):
            x + here
        assert (x + here.to(x.device)).tolist() == [2, 2]
        assert (x + torch.tensor([1.0], device=x.device))[0].item() == 2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_step_of_each_family_has_the_values_that_it_has_on_the_cpu(family):
    kind = DKD if "rcnn" in family else DenseDKD  # which read how the detector matches its boxes
    scores = {"scores": Stage(kind(1.0, 1.0))}
    model = tiny.pair({**stages(), **scores}, family)
    model.teacher.prepare(None)
    moved = move(copy.deepcopy(model))
    expected = tiny.step(model)
    torch.manual_seed(0)
    with elsewhere(), EventStorage(0):
        losses = moved(tiny.batch())
        sum(losses.values()).backward()
    assert {k: x.item() for k, x in losses.items()} == pytest.approx(
        {k: x.item() for k, x in expected.items()}, rel=1e-4
    )
    grads = [p.grad for p in moved.student.parameters() if p.requires_grad]
    assert all(isinstance(x, Elsewhere) for x in [*losses.values(), *grads])


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet"])
def test_nothing_but_the_students_own_forward_waits(family):
    """Detectron2's detectors read numbers from a GPU; teacher, losses and trainer do not.

    The steps measure weights, too.
    """
    model = tiny.pair(stages(), family)
    model.teacher.prepare(None)
    trainer, waited, owner = trainer_of(move(model)), Counter(), ["outside"]
    trainer.log.period = 20  # as on a GPU
    model.student.register_forward_pre_hook(lambda *_: owner.append("student"))
    model.student.register_forward_hook(lambda *_: owner.pop() and None)
    step = trainer.run_step

    def watched():
        owner.append("step")
        step()
        owner.pop()

    trainer.run_step = watched
    with elsewhere(lambda name: waited.update([(owner[-1], name)])):
        trainer.train(0, 3)
    assert "step" not in {who for who, _ in waited}, waited
    assert ("student", "nonzero") in waited


def test_schemes():
    other = Peer(tiny.detector("retinanet", seed=1), one())
    unlabelled = {**tiny.record(seed=5), UNLABELLED: True}
    del unlabelled["instances"]
    means = [tiny.frozen("retinanet"), tiny.frozen("fcos", seed=3)]
    cases = {
        "peers": dict(stages=one("other"), teacher=None, peers={"other": other}),
        "average": dict(stages=one(), teacher=StudentAverage()),
        "mean": dict(stages=one(), teacher=TeacherMean(means)),
    }
    for name, options in cases.items():
        model = move(tiny.pair(**options))
        before = [p.inside.clone() for p in model.student.parameters() if p.requires_grad]
        trainer = trainer_of(model, [*tiny.batch(), unlabelled], clip_grad_norm=1.0, accumulate=2)
        with elsewhere():
            trainer.train(0, 2)
        assert any(k.startswith("distill/maps/") for k in trainer.step.metrics), name
        after = [p.inside for p in model.student.parameters() if p.requires_grad]
        assert not all(torch.equal(a, b) for a, b in zip(after, before)), name


def test_the_start_and_the_teachers_evaluation():
    model = move(tiny.pair(one(), "mask_rcnn"))
    with elsewhere(), torch.no_grad():
        assert len(fit_laterals(model, tiny.batch())) == 4
        assert len(model.teacher.predict(tiny.batch(), "RGB")) == len(model.eval()(tiny.batch()))
