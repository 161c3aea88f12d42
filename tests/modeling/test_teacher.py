"""The teacher: every way to name one, verified weights, frozen, fed with the right pixels."""

import copy
import shutil

import pytest
import tiny
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torch import nn

from sharedkd import ConfigError, CrossLayer, FrozenTeacher, IdenticalLayer, Stage
from sharedkd.config import distill
from sharedkd.modeling.teachers import frozen as teacher_module

YAML = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
LAZY = "COCO-Detection/retinanet_R_50_FPN_1x.py"
ZOO_URL = (
    "https://dl.fbaipublicfiles.com/detectron2/"
    "COCO-Detection/retinanet_R_50_FPN_1x/190397773/model_final_bfca0b.pkl"
)
FPN = frozenset({"fpn"})
# The zoo's normalisation: the mean in BGR order, no scaling.
ZOO_MEAN = [103.53, 116.28, 123.675]


def save(model, path):
    torch.save({"model": model.state_dict()}, path)
    return str(path)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The zoo's RetinaNet R50 with random weights, and a file of them."""
    config = model_zoo.get_config(YAML)
    config.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    model = build_model(config).eval()
    return model, save(model, tmp_path_factory.mktemp("zoo") / "retinanet.pth")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small RGB RetinaNet, and a file of its weights."""
    model = tiny.detector("retinanet", seed=3).eval()
    return model, save(model, tmp_path_factory.mktemp("small") / "small.pth")


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- naming a teacher ------------------------------------------------------------------------


def classic_yaml(folder):
    config = get_cfg()
    config.merge_from_file(model_zoo.get_config_file(YAML))
    config.INPUT.FORMAT = "RGB"
    (folder / "run.yaml").write_text(config.dump())
    return str(folder / "run.yaml")


def classic_config(folder):
    config = model_zoo.get_config(YAML)
    config.MODEL.DEVICE = "cuda"
    config.freeze()
    return config


PY_CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import tiny
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper
from sharedkd.config import distill
model = {model}
dataloader = dict(train=dict(mapper=L(DatasetMapper)(image_format="RGB")))
"""
NODE = 'tiny.node("retinanet")'
DISTILLED = f'distill({NODE}, teacher="a/teacher.yaml", weights="its.pth")'


def py_config(folder, model=DISTILLED):
    path = folder / "config.py"
    path.write_text(PY_CONFIG.format(tests=str(tiny.ROOT / "tests"), model=model))
    return str(path)


def saved_config(folder, model=DISTILLED):
    """What a run saves."""
    path = str(folder / "config.yaml")
    LazyConfig.save(LazyConfig.load(py_config(folder, model)), path)
    return path


def distillation_config(folder):
    config = LazyConfig.load(model_zoo.get_config_file(LAZY))
    config.model = distill(tiny.node("retinanet"), teacher="a/teacher.yaml", weights="its.pth")
    return config


#: way to name a teacher -> (what makes the name, the model's fixture, the order of its channels)
WAYS = {
    "the zoo's yaml": (lambda folder: YAML, "zoo", "BGR"),
    "the zoo's py": (lambda folder: LAZY, "zoo", "BGR"),
    "path to a classic yaml": (classic_yaml, "zoo", "RGB"),
    "classic config": (classic_config, "zoo", "BGR"),
    "path to a py": (lambda folder: py_config(folder, NODE), "small", "RGB"),
    "path to a py of a pair": (py_config, "small", "RGB"),
    "path to what a run saved": (lambda folder: saved_config(folder, NODE), "small", "RGB"),
    "path to what a run of a pair saved": (saved_config, "small", "RGB"),
    "node": (lambda folder: tiny.node("retinanet"), "small", "RGB"),
    "node of a pair": (lambda folder: distillation_config(folder).model, "small", "RGB"),
    "config of a pair": (distillation_config, "small", "BGR"),
    "model": (lambda folder: tiny.detector("retinanet", seed=9), "small", "RGB"),
    "pair": (lambda folder: tiny.pair({}, teacher=None), "small", "RGB"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_way_to_name_a_teacher(request, tmp_path, way):
    make, fixture, input_format = WAYS[way]
    model, weights = request.getfixturevalue(fixture)
    name = make(tmp_path)
    teacher = FrozenTeacher(name, weights)
    assert same_tensors(teacher.model, model)
    assert torch.equal(teacher.model.pixel_mean, model.pixel_mean)
    assert (teacher.weights, teacher.input_format) == (weights, input_format)
    if isinstance(name, str):
        assert teacher.name == name
    if way == "classic config":  # the caller's own is left alone
        assert name.MODEL.DEVICE == "cuda"


def test_by_the_folder_of_a_run(small, tmp_path):
    """Its config and its last checkpoint; one without a checkpoint is refused."""
    model, weights = small
    saved_config(tmp_path)
    with pytest.raises(ConfigError, match="model.teacher.weights=None: .* with a checkpoint"):
        FrozenTeacher(str(tmp_path))
    shutil.copy(weights, tmp_path / "model_0000004.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    teacher = FrozenTeacher(str(tmp_path))
    assert same_tensors(teacher.model, model)
    assert teacher.weights == str(tmp_path / "model_0000004.pth")


def test_input_format_comes_from_config_or_model_unless_given(small):
    node, weights = tiny.node("retinanet"), small[1]
    assert FrozenTeacher(node, weights).input_format == "RGB"  # the model's own
    assert FrozenTeacher(node, weights, "BGR").input_format == "BGR"


def test_a_channel_order_that_nobody_states_is_said(sharedkd_log):
    """FCOS has no input_format: ImageNet's means tell the order, in 0 to 255 or in 0 to 1."""
    model = tiny.detector("fcos")
    for mean, expected, words in (
        ([123.675, 116.28, 103.53], "RGB", "ImageNet"),
        (ZOO_MEAN, "BGR", "ImageNet"),
        ([0.485, 0.456, 0.406], "RGB", "ImageNet"),
        ([90.0, 100.0, 110.0], "BGR", "Detectron2's default"),
    ):
        model.pixel_mean.copy_(torch.tensor(mean).view(3, 1, 1))
        sharedkd_log.clear()
        assert FrozenTeacher(model, "").input_format == expected
        assert f"{expected} is taken" in sharedkd_log.text and words in sharedkd_log.text
    sharedkd_log.clear()
    assert FrozenTeacher(model, "", "RGB").input_format == "RGB"
    assert "model.teacher.input_format" not in sharedkd_log.text


# --- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [YAML, LAZY])
def test_a_zoo_name_brings_its_own_weights(monkeypatch, name):
    asked = []
    monkeypatch.setattr(teacher_module, "load_trained", lambda model, *args: asked.append(args))
    teacher = FrozenTeacher(name)
    assert asked == [(ZOO_URL, "model.teacher.weights", False, None)]
    assert teacher.weights == ZOO_URL


def test_empty_weights_leave_the_model_as_built(sharedkd_log):
    teacher = FrozenTeacher(tiny.detector("retinanet", seed=5), "")
    assert same_tensors(teacher.model, tiny.detector("retinanet", seed=5))
    assert not sharedkd_log.text  # a model that somebody has built may be trained
    FrozenTeacher(tiny.node("retinanet"), "")
    assert "model.teacher.weights is empty" in sharedkd_log.text


def test_no_weights_for_a_teacher_that_is_not_in_the_zoo(small, tmp_path):
    for config in (tiny.node("retinanet"), small[0], classic_yaml(tmp_path)):
        with pytest.raises(ConfigError, match=r"^model\.teacher\.weights=None: [^\n]*$"):
            FrozenTeacher(config)


# --- configs that cannot be used -------------------------------------------------------------


@pytest.mark.parametrize(
    "text, problem",
    [
        ("MODEL:\n  NO_SUCH_KEY: 1\n", "cannot be read"),
        ("MODEL: [", "cannot be read"),
        ("model:\n  _target_: no.such.Thing\n", "cannot be built"),
    ],
)
def test_broken_configs(tmp_path, text, problem):
    """tests/misconfigurations.py has other names, weights and precisions that mean nothing."""
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        FrozenTeacher(str(tmp_path / "a.yaml"), "")
    message = str(error.value)
    assert message.startswith("model.teacher.config=") and problem in message
    assert "\n" not in message


# --- frozen ----------------------------------------------------------------------------------


@pytest.fixture
def pair(small):
    stages = {"identical": Stage(IdenticalLayer()), "cross": Stage(CrossLayer())}
    return tiny.pair(stages, teacher=FrozenTeacher(tiny.node("retinanet"), small[1]))


def test_teacher_is_no_part_of_the_model(pair):
    own = pair.teacher.model
    inside = set(map(id, own.modules()))
    assert not any(id(m) in inside for m in pair.modules())
    tensors = {x.data_ptr() for x in own.state_dict().values()}
    visible = [*pair.parameters(), *pair.buffers(), *pair.state_dict().values()]
    assert not any(x.data_ptr() in tensors for x in visible)
    assert pair.state_dict().keys() == pair.student.state_dict().keys()
    assert not isinstance(pair.teacher, nn.Module)


def test_teacher_stays_frozen_and_in_eval_mode(pair):
    pair.train()
    pair.requires_grad_(True)
    assert pair.student.training and all(p.requires_grad for p in pair.student.head.parameters())
    assert not any(m.training for m in pair.teacher.model.modules())
    assert not any(p.requires_grad for p in pair.teacher.model.parameters())


@pytest.mark.parametrize(
    "move, attribute, expected",
    [
        (lambda m: m.double(), "dtype", torch.float64),
        (lambda m: m.to("meta"), "device", torch.device("meta")),
    ],
)
def test_teacher_goes_where_the_model_goes(pair, move, attribute, expected):
    move(pair)
    for x in (*pair.teacher.model.parameters(), pair.teacher.model.pixel_mean):
        assert getattr(x, attribute) == expected


def test_teacher_moves_on_its_own(small):
    teacher = FrozenTeacher(tiny.detector("retinanet"), "")
    assert teacher.to("meta") is teacher
    assert teacher.model.pixel_mean.device.type == "meta"


# --- pixels and maps -------------------------------------------------------------------------


def test_features_are_those_of_the_teachers_own_network(small):
    model, weights = small
    records = tiny.batch()
    maps = FrozenTeacher(tiny.node("retinanet"), weights).features(
        records, FPN | {"backbone"}, "RGB", 32
    )
    images = model.preprocess_image(records).tensor
    with torch.no_grad():
        pyramid, stages = model.backbone(images), model.backbone.bottom_up(images)
    assert maps["fpn"].keys() == {8, 16, 32, 64, 128}
    for stride, name in zip((8, 16, 32, 64, 128), ("p3", "p4", "p5", "p6", "p7")):
        assert torch.equal(maps["fpn"][stride], pyramid[name])
        assert not maps["fpn"][stride].requires_grad
    for stride, name in zip((8, 16, 32), ("res3", "res4", "res5")):
        assert torch.equal(maps["backbone"][stride], stages[name])


def test_channel_order_by_hand():
    model = tiny.detector("retinanet")
    model.pixel_mean.copy_(torch.tensor([10.0, 20, 30]).view(3, 1, 1))
    model.pixel_std.copy_(torch.tensor([1.0, 2, 4]).view(3, 1, 1))
    image = torch.tensor([50, 60, 70], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)
    teacher = FrozenTeacher(model, "", "RGB")
    same = teacher.preprocess([{"image": image}], "RGB", 32).tensor
    assert same[0, :, 0, 0].tolist() == [40, 20, 10]  # (50-10)/1, (60-20)/2, (70-30)/4
    flipped = teacher.preprocess([{"image": image}], "BGR", 32).tensor
    assert flipped[0, :, 0, 0].tolist() == [60, 20, 5]  # (70-10)/1, (60-20)/2, (50-30)/4


def flipped(records):
    return [{**x, "image": x["image"].flip(0)} for x in records]


def test_predictions_see_the_same_flip(small):
    model, weights = small
    teacher = FrozenTeacher(tiny.node("retinanet"), weights)
    teacher.model.test_score_thresh = model.test_score_thresh = 0.0
    records = tiny.batch()
    with torch.no_grad():
        expected = model(records)
    for found in (teacher.predict(records, "RGB"), teacher.predict(flipped(records), "BGR")):
        for a, b in zip(found, expected):
            assert len(a["instances"]) > 0
            assert torch.equal(a["instances"].scores, b["instances"].scores)
            assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)


# --- made fast --------------------------------------------------------------------------------


@pytest.fixture
def raw():
    """A teacher with norms that do something, and its maps as it was built."""
    model = tiny.detector("faster_rcnn", seed=4)
    draw = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.2, 0.2, generator=draw)
            norm.running_var.uniform_(0.5, 2.0, generator=draw)
    return lambda **options: FrozenTeacher(copy.deepcopy(model), "", "RGB", **options)


def error(found, expected):
    found, expected = (x["fpn"] for x in (found, expected))
    return max(((found[s].float() - x).norm() / x.norm()).item() for s, x in expected.items())


BATCH = [tiny.record(seed=1), tiny.record(seed=2)]


def test_preparing_keeps_the_maps_up_to_rounding(raw):
    teacher, prepared = raw(), raw()
    before = teacher.fingerprint
    change = prepared.prepare()
    assert set(change) == {4, 8, 16, 32, 64} and max(change.values()) < 1e-5
    assert not any(isinstance(m, nn.BatchNorm2d) for m in prepared.model.backbone.modules())
    found, expected = (each.features(BATCH, FPN, "RGB") for each in (prepared, teacher))
    assert error(found, expected) < 1e-5
    assert prepared.fingerprint == before  # of the weights as they were loaded


@pytest.mark.parametrize("precision, step", [("bfloat16", None), (None, torch.bfloat16)])
def test_lower_precision_stays_near_and_is_measured(raw, precision, step):
    teacher = raw(precision=precision)
    change = teacher.prepare(step)
    expected = raw().features(BATCH, FPN, "RGB")
    for _ in range(2):
        found = teacher.features(BATCH, FPN, "RGB")
        assert {x.dtype for x in found["fpn"].values()} == {torch.bfloat16}
        assert 1e-4 < error(found, expected) < 0.05
    assert all(1e-4 < x < 0.05 for x in change.values())
    weights = [x for x in teacher.model.backbone.parameters() if x.dim() == 4]
    assert {x.dtype for x in weights} == {torch.bfloat16}
    assert all(torch.equal(x, x.bfloat16().to(x.dtype)) for x in weights)


def test_precision_does_not_depend_on_the_code_around(raw):
    teacher = raw(precision="float32", fold=False)
    teacher.prepare(torch.bfloat16)
    same = raw()
    same.model.to(memory_format=torch.channels_last)
    expected = same.features(BATCH, FPN, "RGB")
    with torch.autocast("cpu", torch.bfloat16):
        found = teacher.features(BATCH, FPN, "RGB")
    assert all(torch.equal(found["fpn"][s], x) for s, x in expected["fpn"].items())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_its_maps_have_the_layout_that_it_was_placed_in(raw, layout):
    """It computes with channels last on a CPU, whatever the student does."""
    teacher, taps = raw(), frozenset({"fpn", "backbone"})
    expected = teacher.features(BATCH, taps, "RGB")
    teacher.model.to(memory_format=layout)
    teacher.prepare()
    weights = [x for x in teacher.model.parameters() if x.dim() == 4]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in weights)
    found = teacher.features(BATCH, taps, "RGB")
    for tap, levels in found.items():
        assert all(x.is_contiguous(memory_format=layout) for x in levels.values()), tap
    assert max(error({"fpn": found[tap]}, {"fpn": expected[tap]}) for tap in taps) < 1e-5


def test_maps_of_a_prepared_dense_head():
    """They are what they were, and anchors are still one copy for all images."""
    teacher = FrozenTeacher(tiny.detector("retinanet", seed=1), "", input_format="RGB")
    taps = frozenset({"fpn", "logits", "deltas", "boxes", "anchors"})
    expected = teacher.features(BATCH, taps, "RGB")
    teacher.prepare()
    found = teacher.features(BATCH, taps, "RGB")
    assert found.keys() == expected.keys() == taps
    for tap in taps:
        assert error({"fpn": found[tap]}, {"fpn": expected[tap]}) < 1e-5, tap
    assert {x.stride(0) for x in found["anchors"].values()} == {0}
    assert all(x.is_contiguous() for x in found["logits"].values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_prepared_teacher_still_detects(raw, precision):
    expected = raw().predict(BATCH, "RGB")[0]["instances"]
    teacher = raw(precision=precision)
    teacher.prepare()
    found = teacher.predict(BATCH, "RGB")[0]["instances"]
    assert len(found) and abs(len(found) - len(expected)) <= 0.2 * len(expected)
    torch.testing.assert_close(found.scores[:5].float(), expected.scores[:5], rtol=0.05, atol=0.01)


def test_what_a_cpu_cannot_do_is_refused(raw):
    teacher = raw(precision="tf32")
    with pytest.raises(ConfigError, match="model.teacher.precision=tf32.*train.device=cpu"):
        teacher.prepare()


def test_folding_that_changes_maps_is_refused(raw, monkeypatch):
    def spoil(module):
        module.bottom_up.stem.conv1.weight.mul_(1.01)
        return 1

    monkeypatch.setattr(teacher_module, "fold_norms", spoil)
    with pytest.raises(ConfigError, match="model.teacher.fold=True: changes its maps.*fold=False"):
        raw().prepare()


def test_a_compiler_that_fails_is_named(raw, monkeypatch):
    def broken(*args):
        raise RuntimeError("no compiler found\nand much more")

    monkeypatch.setattr(
        teacher_module,
        "compile_backbone",
        lambda model, key: setattr(model.backbone, "forward", broken),
    )
    teacher = raw(compile=True)
    with pytest.raises(ConfigError, match="model.teacher.compile=True: fails: no compiler found; "):
        teacher.prepare()


def test_regions_are_pooled_where_they_are(raw):
    """Coordinates of wide images do not survive bfloat16, in which RoIAlign would take them."""
    wide = [tiny.record(64, 1088, seed=3)]
    boxes = [Boxes(torch.tensor([[1001.3, 5.2, 1043.7, 40.9], [771.4, 9.6, 802.9, 33.1]]))]
    logits = []
    for precision in ("float32", "bfloat16"):
        teacher = raw(precision=precision)
        teacher.prepare()
        maps = teacher.features(wide, FPN, "RGB")
        logits.append(teacher.region_predictions(maps, boxes)[0].float())
    exact, found = logits
    assert (found - exact).norm() < 0.06 * (exact[0] - exact[1]).norm()  # rounded boxes: 0.18
