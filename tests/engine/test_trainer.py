"""The trainer: stages, accumulation, clipping, AMP, seeds."""

import pytest
import tiny
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage

from sharedkd import (
    ConfigError,
    CrossLayer,
    IdenticalLayer,
    SharedKDTrainer,
    Stage,
)

RECORDS = tiny.batch()


def trainer_of(model, lr=0.0, **options):
    sgd = torch.optim.SGD(model.parameters(), lr=lr)
    return SharedKDTrainer(model, iter(lambda: RECORDS, None), sgd, max_iter=10, **options)


def one_step(trainer, iteration=0):
    with EventStorage(iteration) as trainer.storage:
        trainer.iter = iteration
        trainer.before_step()
        trainer.run_step()
        return {k: v[0] for k, v in trainer.storage.latest().items()}


def three_steps(trainer_class, model, **options):
    """The parameters' bytes after three steps in float32 on the same batches, from the same draws."""
    torch.manual_seed(0)
    batches = [tiny.batch(), tiny.batch("half"), tiny.batch()]
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer = trainer_class(model, batches, sgd, **options)
    # The JIT rounds a scripted loss in another way once it has warmed up.
    with torch.jit.optimized_execution(False):
        trainer.train(0, 3)
    return [p.detach().numpy().tobytes() for p in model.parameters()]


@pytest.mark.parametrize("family", ["faster_rcnn", "mask_rcnn", "retinanet"])
def test_without_distillation_it_is_detectron2s_trainer(family):
    """A plain detector, and a pair all of whose stages weigh zero, end with the same bytes."""
    expected = three_steps(SimpleTrainer, tiny.detector(family))
    plain = tiny.detector(family)
    classes = [*map(type, plain.modules())]
    assert three_steps(SharedKDTrainer, plain, max_iter=3) == expected
    stages = {
        "off": Stage(IdenticalLayer(), weight=0.0),
        "late": Stage(IdenticalLayer(), start=1.0),
    }
    model = tiny.pair(stages, family)
    three_steps(SharedKDTrainer, model, max_iter=3)
    student = [p.detach().numpy().tobytes() for p in model.student.parameters()]
    assert student == expected
    for trained in (plain, model.student):
        assert [*map(type, trained.modules())] == classes


def test_accumulation_is_the_mean_of_its_batches():
    trainer = tiny.toy([1, 3, 8], accumulate=3)
    metrics = one_step(trainer)
    assert trainer.module.weight.item() == pytest.approx(1 - (1 + 3 + 8) / 3)
    assert metrics["loss_toy"] == metrics["total_loss"] == pytest.approx(4)


@pytest.mark.parametrize("limit, step", [(2.0, 2.0), (100.0, 8.0)])
def test_clipping(limit, step):
    trainer = tiny.toy([8], clip_grad_norm=limit)
    metrics = one_step(trainer)
    assert trainer.module.weight.item() == pytest.approx(1 - step, abs=1e-4)
    assert metrics["grad_norm"] == pytest.approx(8)


def test_stage_schedule_reaches_the_losses_and_the_log():
    stages = {
        "identical": Stage(IdenticalLayer(strides=[8, 16]), weight=3.0, start=1, ramp=2, end=4)
    }
    trainer = trainer_of(tiny.pair(stages))
    logs = [one_step(trainer, i) for i in range(5)]
    weights = [log["distill/identical/weight"] for log in logs]
    assert weights == [0, 1.5, 3.0, 3.0, 0]
    raw = logs[2]["distill/identical/s8"] + logs[2]["distill/identical/s16"]
    for log, weight in zip(logs, weights):
        detector = log["loss_cls"] + log["loss_box_reg"]
        if weight:
            assert log["loss_distill_identical"] == pytest.approx(weight * raw, rel=1e-4)
            assert log["total_loss"] == pytest.approx(detector + weight * raw, rel=1e-4)
        else:
            assert "loss_distill_identical" not in log
            assert log["total_loss"] == pytest.approx(detector)


def test_teacher_free_training_lowers_the_cross_layer_loss():
    model = tiny.pair({"cross": Stage(CrossLayer(tap="fpn"), weight=1.0)}, teacher=None)
    trainer = trainer_of(model, lr=1e-3)
    logs = [one_step(trainer, i)["loss_distill_cross"] for i in range(4)]
    assert logs[-1] < logs[0]


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet", "fcos"])
def test_bfloat16_on_the_cpu_stays_near_float32(family):
    logs = []
    for amp_dtype in (None, torch.bfloat16):
        model = tiny.pair({"identical": Stage(IdenticalLayer(), weight=1.0)}, family)
        trainer = trainer_of(model, amp_dtype=amp_dtype)
        logs.append(one_step(trainer))
        trainer.max_iter = 1
        trainer.after_train()
        assert not getattr(model.student, "head", torch.nn.Module())._forward_hooks
    for name in logs[0]:
        if name.startswith(("loss_rpn", "loss_fcos", "distill/")):
            assert logs[1][name] == pytest.approx(logs[0][name], rel=0.1, abs=0.02), name


def test_float16_needs_cuda():
    with pytest.raises(ConfigError, match="train.amp.dtype=float16.*use bfloat16"):
        tiny.toy([1], amp_dtype=torch.float16)


def test_draws_depend_on_seed_and_iteration_alone():
    class Drawing(tiny.Toy):
        def forward(self, batch):
            draws.append(torch.rand(2).tolist())
            return super().forward(batch)

    runs = []
    for seed, disturb in ((0, False), (0, True), (1, False)):
        draws, model = [], Drawing()
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        trainer = SharedKDTrainer(
            model, [[{"image": torch.ones(1)}]] * 2, sgd, max_iter=2, seed=seed
        )
        for iteration in range(2):
            one_step(trainer, iteration)
            if disturb:
                torch.rand(17)
        runs.append(draws)
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def steps(trainer, count, logs):
    """Run steps; after each, `logs` gets what the storage has."""
    trainer.storage = EventStorage(0)
    with trainer.storage:
        for trainer.iter in range(count):
            trainer.before_step()
            trainer.run_step()
            logs.append({k: v for k, v in trainer.storage.latest().items() if k != "data_time"})


def test_losses_read_now_and_then_are_those_read_in_each_step():
    values = [1, 3, 8, 2, 7]
    logs = {}
    for period in (1, 2):
        trainer = tiny.toy(values, clip_grad_norm=2.0)
        trainer.schedule_length = len(values)
        trainer.log.period = period  # as on a GPU
        logs[period] = []
        steps(trainer, len(values), logs[period])
        histories = trainer.storage.histories()
        logs[period].append({k: h.values() for k, h in histories.items() if k != "data_time"})
    assert logs[2][-1] == logs[1][-1]  # every value, with its iteration
    assert logs[2][0] == {} and logs[2][1] == logs[2][2] == logs[1][1]
    assert logs[2][4] == logs[1][4]  # the last step is read whatever the period


def test_state_holds_what_resuming_needs():
    model = tiny.pair({"identical": Stage(IdenticalLayer(), weight=1.0)})
    trainer = trainer_of(model, lr=1e-3)
    one_step(trainer)
    state = trainer.state_dict()
    assert state["loss_normalizers"][""] == model.student.loss_normalizer != 100
    other = trainer_of(tiny.pair({"identical": Stage(IdenticalLayer(), weight=1.0)}), lr=1e-3)
    other.load_state_dict(state)
    assert other.detector.loss_normalizer == model.student.loss_normalizer
    assert (
        other.optimizer.state_dict()["param_groups"]
        == trainer.optimizer.state_dict()["param_groups"]
    )
