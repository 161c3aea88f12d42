"""What only a GPU can show: mixed precision of every family, no waiting in a step, NCCL."""

import itertools

import pytest
import tiny
import torch
import torch.distributed as dist
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from sharedkd import SharedKDTrainer
from sharedkd.config import shared_kd_stages

DEVICE = "cuda"
HALVES = [torch.float16, torch.bfloat16]
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def pair(family, device=DEVICE, step_dtype=None, stages=None):
    model = tiny.pair(stages or tiny.shared_kd(), family).to(device)
    model.teacher.prepare(step_dtype)
    return model


def trainer_of(model, dtype):
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=1e-3, momentum=0.9)
    batches = itertools.repeat(tiny.batch())
    return SharedKDTrainer(model, batches, optimizer, max_iter=100, seed=0, amp_dtype=dtype)


def distillation(model, dtype=None):
    """The model's distillation losses of the batch, name -> number."""
    device = model.device.type
    with EventStorage(0), torch.autocast(device, dtype, enabled=dtype is not None):
        losses = model(tiny.batch())
    return {name: x.item() for name, x in losses.items() if name.startswith("distill/")}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_step_of_each_family_in_mixed_precision(family, dtype):
    exact = distillation(pair(family, "cpu"))
    model = pair(family, step_dtype=dtype)
    trainer = trainer_of(model, dtype)
    assert model.teacher.dtype is dtype
    # Untrained maps in 16 bits: patterns agree to about a hundredth.
    assert distillation(model, dtype) == pytest.approx(exact, rel=0.05, abs=0.01)
    before = [p.detach().clone() for p in model.student.parameters()]
    trainer.train(0, 12)  # float16 leaves out the first ones, until its scale fits
    assert all(torch.isfinite(p).all() for p in model.parameters())
    moved = [not torch.equal(p, b) for p, b in zip(model.student.parameters(), before)]
    trained = [p.requires_grad for p in model.student.parameters()]
    assert all(m for m, t in zip(moved, trained) if t) and sum(moved) == sum(trained)


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_nothing_but_the_students_own_forward_waits_for_the_gpu(family, dtype):
    """Detectron2's detectors read numbers from the GPU; teacher, losses and trainer do not.

    float16 is left out: PyTorch's GradScaler reads one number a step.  The steps measure weights, too.
    """
    stages = shared_kd_stages()
    stages.cross.weight = "auto"
    model = pair(family, step_dtype=dtype, stages=instantiate(stages))
    trainer = trainer_of(model, dtype)
    trainer.train(0, 3)
    student, allow = model.student, torch.cuda.set_sync_debug_mode
    handles = [
        student.register_forward_pre_hook(lambda *_: allow("default")),
        student.register_forward_hook(lambda *_: allow("error")),
    ]
    step = trainer.run_step

    def watched():
        allow("error")
        try:
            step()
        finally:
            allow("default")

    trainer.run_step = watched
    trainer.train(3, 6)
    for handle in handles:
        handle.remove()


def test_a_teacher_that_no_active_stage_needs_does_not_run():
    model = pair("faster_rcnn")
    calls = []
    model.teacher.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    for weights, expected in (({"cross": 1.0}, 0), ({}, 0), ({"identical": 1.0}, 1)):
        calls.clear()
        with EventStorage(0):
            model(tiny.batch(), weights)
        assert len(calls) == expected, weights


def test_one_process_trains_over_nccl(tmp_path):
    dist.init_process_group("nccl", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(pair("faster_rcnn"), device_ids=[0])
        before = [p.detach().clone() for p in model.parameters()]
        trainer_of(model, torch.bfloat16).train(0, 2)
        assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before))
        number = torch.ones(1, device=DEVICE)
        dist.all_reduce(number)
        assert number.item() == 1.0
    finally:
        dist.destroy_process_group()
