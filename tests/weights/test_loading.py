"""Weights in and out: strict loading, initialisation, inheritance, and saves that cannot be torn."""

import copy
import functools
import os
import pickle
import re

import numpy as np
import pytest
import tiny
import torch
import torchvision
from detectron2.layers import Conv2d

from sharedkd import ConfigError
from sharedkd.engine.checkpoint import StudentCheckpointer
from sharedkd.weights.conventions import convention_of_file, convention_of_model
from sharedkd.weights.loading import inherit, initialise, load_trained, parts_of

BOTTOM_UP = "backbone.bottom_up."


def save(state, path):
    torch.save({"model": state}, path)
    return str(path)


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def changed(model, before):
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


def fails(match, call, *args):
    with pytest.raises(ConfigError, match=match) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- load_trained ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """State of a Faster R-CNN whose every tensor differs from a fresh one's."""
    state = tiny.detector("faster_rcnn", seed=1).state_dict()
    state.update({k: v + 1 for k, v in state.items() if v.is_floating_point()})
    return state


@pytest.fixture
def model():
    return tiny.detector("faster_rcnn", seed=0)


ANCHORS = "proposal_generator.anchor_generator.cell_anchors.0"
CLS = "roi_heads.box_predictor.cls_score.weight"
STRICT = {
    "as saved": ({}, None),
    "no counters": ({"num_batches_tracked": None}, None),
    "no normalisation": ({"pixel_": None}, None),
    "old anchors": ({ANCHORS: torch.zeros(3, 4)}, None),
    "a weight missing": ({CLS: None}, f"1 missing in the file: {CLS}\\)"),
    "a running mean missing": ({"res2.0.conv1.norm.running_mean": None}, "1 missing in the file"),
    "a weight too many": (
        {"roi_heads.mask.weight": torch.zeros(1)},
        "1 unknown to the model: roi_",
    ),
    "another shape": (
        {CLS: torch.zeros(9, 256)},
        rf"1 of another shape: {CLS} \(9, 256\) against \(4, 256\)\)",
    ),
    "many": ({"roi_heads.": None}, "8 missing in the file: .*, .*, .* and 5 more"),
}


@pytest.mark.parametrize("edit, problem", STRICT.values(), ids=STRICT)
def test_load_trained_is_strict(model, trained, tmp_path, edit, problem):
    state = copy.copy(trained)  # with the version numbers that make PyTorch expect counters
    for name, value in edit.items():
        if value is None:
            for key in [k for k in state if name in k]:
                del state[key]
        else:
            state[name] = value
    path = save(state, tmp_path / "a.pth")
    if problem is None:
        load_trained(model, path, "key")
        kept = {k for k in trained if "pixel" not in k and "num_batches" not in k}
        assert all(torch.equal(model.state_dict()[k], trained[k]) for k in kept)
    else:
        said = fails(f"^key={path}: .*{problem}", load_trained, model, path, "key")
        assert ("missing" in said) == ("missing" in problem)


# --- initialise ------------------------------------------------------------------------------


def imagenet_pkl(path, depth, fc=True, **entries):
    """A file as Detectron2's torchvision converter writes it; returns its path and its arrays."""
    bottom_up = tiny.detector("retinanet", depth=depth, seed=4).backbone.bottom_up
    arrays = {k: v.numpy() for k, v in bottom_up.state_dict().items() if "num_batches" not in k}
    extra = {
        "stem.fc.weight": torch.ones(1000, 512).numpy(),
        "stem.fc.bias": torch.ones(1000).numpy(),
    }
    data = {
        "model": {**arrays, **(extra if fc else {})},
        "__author__": "torchvision",
        "matching_heuristics": True,
        **entries,
    }
    path.write_bytes(pickle.dumps(data))
    return str(path), arrays


@pytest.mark.parametrize("family, fc", [("retinanet", True), ("mask_rcnn", False)])
def test_initialise_with_an_imagenet_backbone(tmp_path, family, fc):
    path, arrays = imagenet_pkl(tmp_path / "R-18.pkl", 18, fc)
    assert "stem.conv1.weight" in arrays and "res2.0.conv1.weight" in arrays
    model = tiny.detector(family)
    before = snapshot(model)
    initialise(model, path)
    state = model.state_dict()
    assert all(torch.equal(state[BOTTOM_UP + k], torch.from_numpy(v)) for k, v in arrays.items())
    assert all(name.startswith(BOTTOM_UP) for name in changed(model, before))


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvisions_own_file(tmp_path, depth):
    """Its ResNet and ours compute the same maps, whatever wraps the names in the file."""
    torch.manual_seed(3)
    classifier = getattr(torchvision.models, f"resnet{depth}")()
    x = torch.rand(2, 3, 64, 64)
    for _ in range(2):  # statistics that are not those of its initialisation
        classifier(x)
    classifier.eval()
    with torch.no_grad():
        stem = classifier.maxpool(classifier.relu(classifier.bn1(classifier.conv1(x))))
        layers = (classifier.layer1, classifier.layer2, classifier.layer3, classifier.layer4)
        expected = functools.reduce(lambda found, layer: layer(found), layers, stem)
    state = classifier.state_dict()
    for given in (state, {"model": state}, {f"module.{k}": x for k, x in state.items()}):
        torch.save(given, tmp_path / "resnet.pth")
        model = tiny.detector("retinanet", depth).eval()
        filled = initialise(model, str(tmp_path / "resnet.pth"))
        assert filled.convention.maker == "torchvision's" and filled.convention.order == "RGB"
        with torch.no_grad():
            found = model.backbone.bottom_up(x)["res5"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    other = tiny.detector("retinanet", 68 - depth)
    fails("was made for another backbone", initialise, other, str(tmp_path / "resnet.pth"))


@pytest.mark.parametrize(
    "whole, file, model, problem",
    [
        (False, 18, 34, "16 of its convolutions missing, 0 of another shape, 0 too many"),
        (False, 34, 18, "0 of its convolutions missing, 0 of another shape, 16 too many"),
        (True, 50, 18, ""),
    ],
)
def test_weights_of_another_depth(tmp_path, whole, file, model, problem):
    path = str(tmp_path / "a.pth")
    if whole:
        save(tiny.detector("retinanet", depth=file).state_dict(), path)
    else:
        path, _ = imagenet_pkl(tmp_path / "other.pkl", file)
    message = f"^key={path}: was made for another backbone .*{problem}"
    fails(message, initialise, tiny.detector("retinanet", depth=model), path, "key")


def test_initialise_with_a_detector_of_other_classes(tmp_path):
    source = tiny.detector("retinanet", num_classes=7, seed=6).state_dict()
    model = tiny.detector("retinanet")
    before = snapshot(model)
    initialise(model, save(source, tmp_path / "seven.pth"))
    head = {"head.cls_score.weight", "head.cls_score.bias"}
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name] if name in head else source[name]), name


def test_initialise_with_a_detector_of_another_family(tmp_path):
    source = tiny.detector("fcos", seed=6).state_dict()
    model = tiny.detector("faster_rcnn")
    before = snapshot(model)
    initialise(model, save(source, tmp_path / "fcos.pth"))
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in source.items() if k.startswith(BOTTOM_UP))
    assert torch.equal(state[CLS], before[CLS])


def test_initialise_with_something_else(tmp_path):
    path = save({"layer.weight": torch.ones(3)}, tmp_path / "a.pth")
    fails("another backbone", initialise, tiny.detector("retinanet"), path)
    fails("no such file", initialise, tiny.detector("retinanet"), str(tmp_path / "b.pth"))
    fails("cannot be read", initialise, tiny.detector("retinanet"), "ResNet18_Weights.NOT_THERE")


def test_nothing_to_initialise_with():
    model = tiny.detector("retinanet")
    before = snapshot(model)
    initialise(model, "")
    assert not changed(model, before)


# --- conventions -----------------------------------------------------------------------------

RGB, BGR = [123.675, 116.28, 103.53], [103.53, 116.28, 123.675]
STEM, VARIANCE = "stem.conv1.weight", "stem.conv1.norm.running_var"


def stem(variance):
    """Weights of sum of squares 2, and the variance of what they made of the images."""
    weight = torch.zeros(2, 3, 7, 7)
    weight[:, 0, 0, 0] = 1
    return {STEM: weight, VARIANCE: torch.tensor([variance, variance + 1])}


def caffe2(inner=64, norm="bn"):
    shapes = {"res2_0_branch2a_w": (64, 64, 1, 1), "res2_0_branch2b_w": (64, inner, 3, 3)}
    return {**{k: torch.zeros(x) for k, x in shapes.items()}, f"res_conv1_{norm}_s": torch.zeros(1)}


#: A file's entries, and the order, standard deviation and place of the stride that they say
CONVENTIONS = {
    "MSRA/R-50": ({"model": caffe2(), "__author__": "Caffe2"}, ("BGR", 1, True)),
    "FAIR/X-101-32x8d": ({"model": caffe2(8), "__author__": "Caffe2"}, ("BGR", 57, False)),
    "FAIR/R-50-GN": ({"model": caffe2(64, "gn"), "__author__": "Caffe2"}, ("BGR", 1, False)),
    "torchvision/R-50": ({"model": stem(2.0), "__author__": "torchvision"}, ("RGB", 57, False)),
    "pycls": ({"model": stem(2.0), "__author__": "pycls"}, ("BGR", 57, None)),
    "a detector": (
        {"model": {"pixel_mean": torch.tensor(BGR), "pixel_std": torch.ones(3)}},
        ("BGR", 1, None),
    ),
    "statistics of divided pixels": ({"model": stem(4.0)}, (None, 57, None)),
    "statistics of pixels": ({"model": stem(20_000.0)}, (None, 1, None)),
    "a detector's statistics": (
        {"model": {BOTTOM_UP + k: x for k, x in stem(20_000.0).items()}},
        (None, 1, None),
    ),
    "statistics that were never set": (
        {"model": {STEM: stem(1.0)[STEM], VARIANCE: torch.ones(2)}},
        (None, None, None),
    ),
    "names alone": ({"model": {"x": torch.ones(1)}}, (None, None, None)),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_what_a_file_says_of_its_images(name):
    data, expected = CONVENTIONS[name]
    found = convention_of_file(data)
    assert (found.order, found.std and int(sum(found.std) / 3), found.stride_in_1x1) == expected


def test_what_a_model_makes_of_its_images():
    model = tiny.detector("retinanet", depth=50)
    found = convention_of_model(model)
    assert found.order == "RGB" and np.allclose(found.mean, RGB) and not found.stride_in_1x1
    # There is no 1x1 convolution.
    assert convention_of_model(tiny.detector("retinanet")).stride_in_1x1 is None
    theirs = convention_of_file(CONVENTIONS["MSRA/R-50"][0])
    assert theirs.differences(found) == ["order", "stride_in_1x1", "std"]
    assert found.differences(theirs) == ["order", "stride_in_1x1", "std"]
    assert convention_of_file(CONVENTIONS["torchvision/R-50"][0]).differences(found) == []
    assert found.differences(found._replace(std=[70.0])) == []  # statistics of other images


def test_trained_weights_of_another_normalisation_are_refused(model, trained, tmp_path):
    own = {"pixel_mean": torch.tensor(RGB).view(-1, 1, 1), "pixel_std": model.pixel_std.clone()}
    load_trained(model, save({**trained, **own}, tmp_path / "a.pth"), "key")
    own["pixel_mean"] = own["pixel_mean"].flip(0)
    path = save({**trained, **own}, tmp_path / "b.pth")
    fails(r"pixel_mean \[103.53, 116.28, 123.675\] against", load_trained, model, path, "key")


# --- inherit ---------------------------------------------------------------------------------

LATERALS = {
    f"backbone.fpn_{kind}{level}.{x}"
    for kind in ("lateral", "output")
    for level in (3, 4, 5)
    for x in ("weight", "bias")
}
TOP = {f"backbone.top_block.{level}.{x}" for level in ("p6", "p7") for x in ("weight", "bias")}
OUTPUTS = {k for k in LATERALS if "output" in k} | {k for k in TOP if "p7" in k}
TOWERS = {
    f"head.{tower}_subnet.{layer}.{x}"
    for tower in ("cls", "bbox")
    for layer in (0, 2)
    for x in ("weight", "bias")
} | {"head.bbox_pred.weight", "head.bbox_pred.bias"}
SCORES = {"head.cls_score.weight", "head.cls_score.bias"}
INHERITED = {
    "neck": (["neck"], 34, 3, LATERALS | TOP),
    "head": (["head"], 34, 3, TOWERS | SCORES),
    "both": (["neck", "head"], 34, 3, LATERALS | TOP | TOWERS | SCORES),
    "other classes": (["head"], 34, 7, TOWERS),
    "a wider backbone": (["neck"], 50, 3, OUTPUTS),
    "nothing": ([], 34, 3, set()),
}


@pytest.mark.parametrize("parts, depth, classes, names", INHERITED.values(), ids=INHERITED)
def test_inherit(sharedkd_log, parts, depth, classes, names):
    student = tiny.detector("retinanet")
    teacher = tiny.detector("retinanet", depth, classes, seed=1)
    for p in teacher.parameters():
        p.data += 1  # biases start at zero in both
    before, source = snapshot(student), snapshot(teacher)
    copied = inherit(student, teacher, parts)
    assert sorted(copied) == sorted(names)
    assert changed(student, before) == names
    assert all(torch.equal(student.state_dict()[k], source[k]) for k in names)
    assert not changed(teacher, source)
    assert all(name in sharedkd_log.text for name in names)
    for p in student.parameters():  # a copy, not the same memory
        p.data += 1
    assert not changed(teacher, source)


def test_what_the_initial_weights_have_is_not_inherited(tmp_path):
    """A backbone has neither part; a detector has both, of other classes, too."""
    path = str(tmp_path / "initial.pth")
    for classes, copied in ((None, LATERALS | TOP | TOWERS | SCORES), (3, set()), (7, set())):
        student, teacher = tiny.detector("retinanet", 34), tiny.detector("retinanet", 34, seed=1)
        source = tiny.detector("retinanet", 34, classes or 3, seed=2)
        torch.save((source if classes else source.backbone.bottom_up).state_dict(), path)
        there = parts_of(initialise(student, path).names)
        parts = [x for x in ("neck", "head") if x not in there]
        assert set(inherit(student, teacher, parts)) == copied


def test_inherit_from_a_two_stage_teacher():
    student, teacher = tiny.detector("faster_rcnn"), tiny.detector("mask_rcnn", 34, seed=1)
    copied = inherit(student, teacher, ["head"])
    assert CLS in copied and "proposal_generator.rpn_head.conv.weight" in copied
    assert all(k.startswith(("proposal_generator.", "roi_heads.box_")) for k in copied)


def test_inherit_from_a_teacher_that_sees_larger_images():
    """At twice the size, what is level 3 to the student is level 4 to the teacher."""
    student, teacher = tiny.detector("retinanet"), tiny.detector("retinanet", seed=1)
    source = snapshot(teacher)
    copied = inherit(student, teacher, ["neck"], 2)
    assert sorted(copied) == sorted(k for k in OUTPUTS if re.search("output[34]", k))
    for level in (3, 4):
        ours, theirs = (f"backbone.fpn_output{x}.weight" for x in (level, level + 1))
        assert torch.equal(student.state_dict()[ours], source[theirs])


def test_a_layer_that_does_not_fit_keeps_its_own_bias_and_norm():
    def detector(channels):
        convs = {
            "fpn_lateral3": Conv2d(channels, 4, 1, norm=torch.nn.BatchNorm2d(4)),
            "fpn_output3": Conv2d(4, 4, 3, norm=torch.nn.BatchNorm2d(4)),
        }
        return torch.nn.ModuleDict({"backbone": torch.nn.ModuleDict(convs)})

    copied = inherit(detector(2), detector(8), ["neck"])
    assert {x.split(".")[1] for x in copied} == {"fpn_output3"} and len(copied) == 7


def test_inherit_errors():
    student, teacher = tiny.detector("retinanet"), tiny.detector("faster_rcnn")
    fails(
        r"^train.inherit=\['tail'\]: no such part; .*neck.*head",
        inherit,
        student,
        teacher,
        ["neck", "tail"],
    )
    assert not inherit(student, teacher, ["head"])


# --- StudentCheckpointer ---------------------------------------------------------------------


def test_last_checkpoint_is_replaced_at_once(tmp_path, monkeypatch):
    """tests/engine/test_checkpoint.py breaks off the saving itself."""
    checkpointer = StudentCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("first")

    def dying_replace(source, target):
        raise OSError("killed")

    monkeypatch.setattr(os, "replace", dying_replace)
    with pytest.raises(OSError):
        checkpointer.tag_last_checkpoint("second.pth")
    assert (tmp_path / "last_checkpoint").read_text() == "first.pth"


def test_only_the_main_process_writes(tmp_path):
    StudentCheckpointer(torch.nn.Linear(1, 1), str(tmp_path), save_to_disk=False).save("a")
    assert not os.listdir(tmp_path)
