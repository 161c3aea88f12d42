"""Sources of maps beside the frozen teacher: the mean of several, and the average of the student."""

import copy

import pytest
import tiny
import torch
from detectron2.utils.events import EventStorage

from sharedkd import ConfigError, IdenticalLayer, Stage
from sharedkd.modeling.backbones import compile_backbone
from sharedkd.modeling.snapshot import without_trace
from sharedkd.modeling.teachers import StudentAverage, TeacherMean

TAPS = frozenset({"fpn"})


def maps_of(source):
    return source.features(tiny.batch(), TAPS, "RGB", 32)["fpn"]


def test_the_mean_of_one_teacher_is_that_teacher():
    one = tiny.frozen()
    mean = maps_of(TeacherMean([one]))
    assert all(torch.equal(x, mean[stride]) for stride, x in maps_of(one).items())


def test_the_mean_of_two_is_that_of_their_standardised_maps():
    one, other = tiny.frozen(), tiny.frozen(seed=2)
    found = maps_of(TeacherMean([one, other], weights=[1, 3]))

    def standardised(x):
        x = x.double()
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
        return (x - mean) / (var + 1e-6).sqrt()

    for stride, x in maps_of(one).items():
        expected = standardised(x) / 4 + standardised(maps_of(other)[stride]) * 3 / 4
        assert torch.allclose(found[stride].double(), expected, atol=1e-4)


def test_what_has_no_mean_is_refused():
    with pytest.raises(ConfigError, match="teachers"):
        TeacherMean([])
    for weights in ([1, 2], [0], [float("nan")], ["a"]):
        with pytest.raises(ConfigError, match="weights"):
            TeacherMean([tiny.frozen()], weights=weights)
    with pytest.raises(ConfigError, match="teachers=StudentAverage: has no maps of its own"):
        TeacherMean([tiny.frozen(), StudentAverage()])
    one, other = tiny.frozen(), tiny.frozen()
    other.shapes = {"fpn": {s: 2 * c for s, c in one.shapes["fpn"].items()}, "backbone": {}}
    one.shapes = {**one.shapes, "backbone": {}}
    with pytest.raises(ConfigError, match="no level of the same width"):
        TeacherMean([one, other])


def averaged(decay=0.5, optimizer=torch.optim.SGD, start=0, **options):
    stages = {"identical": Stage(IdenticalLayer(strides=[8]), start=start)}
    model = tiny.pair(stages, teacher=StudentAverage(decay))
    model.teacher.prepare()
    return model, optimizer(model.parameters(), lr=0.01, **options)


def step(model, optimizer, iteration, batches=1):
    with EventStorage(iteration):
        for _ in range(batches):
            sum(model(tiny.batch()).values()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "options", [{}, dict(optimizer=torch.optim.AdamW, fused=True), dict(start=2)]
)
def test_the_average_follows_the_student(options):
    """By hand: it begins as the student; d is (1 + step) / (10 + step), here 0.1, then 2 / 11."""
    model, optimizer = averaged(**options)
    name = "head.cls_score.weight"
    values = [model.student.state_dict()[name].clone()]
    for iteration, batches in enumerate((1, 2, 1)):
        if iteration == 0:
            model.teacher.state_dict()  # saving changes nothing
        step(model, optimizer, iteration, batches)
        values.append(model.student.state_dict()[name].clone())
    assert not any(torch.equal(x, y) for x, y in zip(values, values[1:]))
    first = 0.1 * values[0] + 0.9 * values[1]
    second = 2 / 11 * first + 9 / 11 * values[2]
    state = model.teacher.state_dict()
    assert torch.allclose(state["model"][name], second, atol=1e-7) and state["steps"] == 2
    assert state["model"].keys() == model.state_dict().keys()
    assert all(p.grad is None for p in model.teacher.detector.parameters())
    ids = {id(p) for p in model.parameters()}
    assert not ids & {id(p) for p in model.teacher.detector.parameters()}


def test_a_forward_without_a_trace_is_no_step_of_the_average():
    model, optimizer = averaged()
    for iteration in range(2):
        step(model, optimizer, iteration)
    before = copy.deepcopy(model.teacher.state_dict())
    with EventStorage(1), without_trace(model):
        model(tiny.batch())
    after = model.teacher.state_dict()
    assert after["steps"] == before["steps"] and after["iteration"] == 1
    assert all(torch.equal(after["model"][k], x) for k, x in before["model"].items())


def test_the_average_runs_its_own_network():
    """The student's forward may be compiled once the average is prepared."""
    model, _ = averaged(decay=0.999)
    compile_backbone(model.student, "eager")
    seen = [model.teacher.features(tiny.batch(), TAPS, "RGB")["fpn"][8]]
    for p in model.student.backbone.bottom_up.parameters():
        p.data.mul_(3)
    seen.append(model.teacher._inner.features(tiny.batch(), TAPS, "RGB")["fpn"][8])
    assert torch.equal(*seen)


def test_a_resumed_average_continues():
    whole, optimizer = averaged()
    for iteration in range(3):
        step(whole, optimizer, iteration)
    state = copy.deepcopy(whole.teacher.state_dict())
    other, _ = averaged()
    other.load_state_dict(whole.state_dict())
    other.teacher.load_state_dict(state)
    for iteration in (2, 3):  # what is asked for once more in an iteration is no step
        for model in (whole, other):
            with EventStorage(iteration):
                model.teacher.begin_step()
        one, two = whole.teacher.state_dict(), other.teacher.state_dict()
        assert one["steps"] == two["steps"] == iteration
        assert all(torch.equal(two["model"][k], x) for k, x in one["model"].items())
