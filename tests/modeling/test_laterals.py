"""Laterals fitted to a teacher's, against NumPy's least squares."""

import numpy as np
import pytest
import tiny
import torch
from omegaconf import OmegaConf

from sharedkd import FrozenTeacher
from sharedkd.data.loader import TrainLoader
from sharedkd.engine.parts import Parts
from sharedkd.modeling.laterals import RIDGE, fit_laterals
from sharedkd.modeling.teachers import StudentAverage

W2 = "backbone.fpn_lateral2.weight"
LATERALS = [f"backbone.fpn_lateral{level}" for level in (2, 3, 4, 5)]


def pair(teacher_depth=34, scale=1, student=None):
    teacher = tiny.frozen("faster_rcnn", teacher_depth, scale=scale)
    return tiny.pair({}, student or "faster_rcnn", teacher)


def records(scale=1):
    found = [tiny.record(128, 160, seed=i) for i in range(4)]
    for x in found:
        larger = torch.nn.functional.interpolate(x["image"][None].float(), scale_factor=scale)
        x["larger_image"] = larger[0]
    return found


def state(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def bottom_up(detector, images, name):
    with torch.no_grad():
        pixels = detector.preprocess_image([{"image": x} for x in images]).tensor
        return detector.backbone.bottom_up(pixels)[name]


@pytest.mark.parametrize("depth, scale, norm", [(34, 1, "FrozenBN"), (50, 1, "BN"), (50, 2, "BN")])
def test_each_is_the_ridge_solution_for_the_teachers_outputs(depth, scale, norm):
    """A batch norm normalises as in training, and its running statistics stay."""
    node = tiny.node("faster_rcnn")
    node.backbone.bottom_up.stages.norm = norm
    model, up = pair(depth, scale, tiny.instantiate(node)), scale - 1
    before, teacher = state(model.student), state(model.teacher.model)
    explained = fit_laterals(model, records(scale))
    assert list(explained) == LATERALS[: 4 - up]
    after = state(model.student)
    student, other = model.student, model.teacher.model
    for level in (2, 3, 4, 5)[: 4 - up]:
        inputs = bottom_up(student, [r["image"] for r in records(scale)], f"res{level}")
        lateral = getattr(other.backbone, f"fpn_lateral{level + up}")
        larger = [r["larger_image"] for r in records(scale)]
        with torch.no_grad():
            outputs = lateral(bottom_up(other, larger, f"res{level + up}"))
        assert inputs.shape[2:] == outputs.shape[2:]
        x, y = (z.permute(0, 2, 3, 1).flatten(0, 2).double().numpy() for z in (inputs, outputs))
        # The ridge as more rows: of zeros for y, and without the bias.
        weight = np.sqrt(RIDGE * np.square(x).sum(0).mean())
        rows = np.hstack([x, np.ones((len(x), 1))])
        more = np.hstack([weight * np.eye(x.shape[1]), np.zeros((x.shape[1], 1))])
        zeros = np.zeros((len(more), y.shape[1]))
        solution = np.linalg.lstsq(np.vstack([rows, more]), np.vstack([y, zeros]), rcond=None)[0]
        found = getattr(student.backbone, f"fpn_lateral{level}")
        np.testing.assert_allclose(found.weight[:, :, 0, 0].T.detach(), solution[:-1], atol=1e-4)
        np.testing.assert_allclose(found.bias.detach(), solution[-1], atol=1e-4)
        share = 1 - np.square(rows @ solution - y).sum() / np.square(y - y.mean(0)).sum()
        assert explained[f"backbone.fpn_lateral{level}"] == pytest.approx(share, abs=1e-4)
    if up:  # the teacher has no level above its own fifth
        assert not any(p.any() for p in student.backbone.fpn_lateral5.parameters())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name.rpartition(".")[0] for name in changed} == {*LATERALS}
    assert all(
        torch.equal(x, teacher[name]) for name, x in model.teacher.model.state_dict().items()
    )


def test_a_twin_of_the_teacher_has_its_pyramid():
    student = tiny.detector("faster_rcnn", 34, seed=1)
    for name in LATERALS:
        student.get_submodule(name).reset_parameters()
    model = pair(student=student.train())
    explained = fit_laterals(model, records())
    assert min(explained.values()) > 0.99 and student.training
    images = student.preprocess_image(records()).tensor
    with torch.no_grad():
        ours, theirs = (x.backbone(images)["p3"] for x in (student, model.teacher.model))
    assert (ours - theirs).norm() < 0.1 * theirs.norm()


def test_a_pyramid_before_the_fpn_and_maps_beyond_float16_fit_nothing():
    before = state(tiny.detector("faster_rcnn"))
    for pyramid, bias in (("backbone.bottom_up", 0.0), (None, float("inf"))):
        other = tiny.detector("faster_rcnn", 34, seed=1)
        other.backbone.fpn_lateral3.bias.data += bias
        teacher = FrozenTeacher(other, "", "RGB", pyramid=pyramid)
        student = tiny.detector("faster_rcnn")
        model = tiny.pair({}, student, teacher)
        assert fit_laterals(model, records()) == {}
        assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())


def test_other_widths_are_left_alone():
    student = tiny._models().small_faster_rcnn(18, tiny.CLASSES, 64)
    student = tiny.instantiate(student)
    before = state(student)
    assert fit_laterals(pair(student=student), records()) == {}
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())


class Loader(TrainLoader):
    def __init__(self):
        pass

    def samples(self, most):
        return records()[:most]


def test_an_average_of_the_student_begins_as_the_fitted_one():
    average, student = StudentAverage(), tiny.detector("faster_rcnn")
    teacher = tiny.frozen("faster_rcnn", 34)
    model = tiny.pair({}, student, teacher, teachers={"average": average})
    average.prepare()
    before = state(student)
    for images, fitted in ((0, []), (4, LATERALS)):
        cfg = OmegaConf.create({"train": {"inherit_images": images}})
        sources = {None: teacher, "average": average}
        inherited = ["backbone.fpn_output2.weight"]
        given = dict(model=model, student=model.student, teachers=sources)
        parts = Parts(cfg, **given, inherited=inherited, loader=Loader())
        parts.fit()
        assert list(parts.fitted) == fitted
        assert torch.equal(student.backbone.fpn_lateral2.weight, before[W2]) == (images == 0)
    found = average.state_dict()
    assert found["steps"] == 0
    assert all(torch.equal(x, found["model"][name]) for name, x in student.state_dict().items())
