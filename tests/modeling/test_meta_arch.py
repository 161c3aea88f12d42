"""Student and teacher side by side: who is trained, what is computed, and which pixels are compared."""

import copy

import families
import pytest
import tiny
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from sharedkd import ConfigError, CrossLayer, FrozenTeacher, IdenticalLayer, SharedKD, Stage
from sharedkd.config import add_sharedkd_config
from sharedkd.engine import parts
from sharedkd.losses import FGD
from sharedkd.weights.loading import fingerprint

BOXES = ((8, 8, 40, 40), (20, 16, 60, 44))


def records(ground_truth="full"):
    """Two images of at most 64 pixels, so that a pair costs fractions of a second."""
    first = () if ground_truth == "empty" else BOXES
    second = BOXES if ground_truth == "full" else ()
    return [tiny.record(48, 64, first, seed=1), tiny.record(64, 60, second, seed=2)]


def stages(**weights):
    every = {
        # Raw distances: standardising a map of a single position leaves nothing to compare.
        "identical": IdenticalLayer(),
        "cross": CrossLayer(tap="backbone"),
    }
    weights = weights or dict(identical=0.5, cross=0.25)
    return {name: Stage(every[name], weight) for name, weight in weights.items()}


def pair(student="retinanet", teacher="retinanet", **weights):
    return tiny.pair(stages(**weights), student, teacher)


def step(model, batch=None, *weights):
    return tiny.step(model, records() if batch is None else batch, *weights)


def terms(losses):
    return {k for k in losses if k.startswith("distill/")}


# --- the student is unchanged ----------------------------------------------------------------


def test_inference_is_the_students_own():
    model = pair("mask_rcnn").eval()
    plain = tiny.detector("mask_rcnn").eval()
    plain.load_state_dict(model.state_dict())
    for each in (plain, model.student):
        each.roi_heads.box_predictor.test_score_thresh = 0.0
    with torch.no_grad():
        ours, expected = model(records()), plain(records())
    for a, b in zip(ours, expected):
        a, b = a["instances"].get_fields(), b["instances"].get_fields()
        assert a.keys() == b.keys() and len(a["scores"]) > 0
        assert torch.equal(a["pred_boxes"].tensor, b["pred_boxes"].tensor)
        assert all(torch.equal(a[k], b[k]) for k in a if k != "pred_boxes")


def test_inference_runs_neither_teacher_nor_losses(monkeypatch):
    model = pair().eval()
    monkeypatch.setattr(model.teacher, "features", None)
    model.losses = None
    with torch.no_grad():
        assert len(model(records())) == 2


def levels(family):
    one_stage = family in ("retinanet", "fcos")
    return (
        ((8, 16, 32, 64, 128), (8, 16, 32)) if one_stage else ((4, 8, 16, 32, 64), (4, 8, 16, 32))
    )


#: Each family once as the student and once as the teacher; tests/families.py has more of them.
PAIRS = [
    ("faster_rcnn", "cascade_mask_rcnn", "half"),
    ("mask_rcnn", "retinanet", "empty"),
    ("cascade_mask_rcnn", "fcos", "full"),
    ("retinanet", "faster_rcnn", "empty"),
    ("fcos", "mask_rcnn", "half"),
]


@pytest.mark.parametrize("student, teacher, ground_truth", PAIRS)
def test_a_step_trains_and_leaves_the_losses_and_classes_of_the_student_alone(
    student, teacher, ground_truth
):
    plain, model = tiny.detector(student), pair(student, teacher)
    batch = records(ground_truth)
    classes = [(name, type(m)) for name, m in plain.named_modules()]
    expected, losses = step(plain, batch), step(model, batch)
    own = {k: v.item() for k, v in losses.items() if k not in terms(losses)}
    assert own == {k: v.item() for k, v in expected.items()}
    (fpn, backbone), (other, _) = levels(student), levels(teacher)
    names = {f"distill/identical/s{s}" for s in fpn if s in other}
    names |= {f"distill/cross/s{a}_s{b}" for a in backbone for b in backbone if a < b}
    assert terms(losses) == names
    assert all(v.isfinite() and v.dim() == 0 for v in losses.values())
    assert all(losses[k] > 0 for k in names)
    sum(losses.values()).backward()
    assert [(name, type(m)) for name, m in model.student.named_modules()] == classes
    grads = [p.grad for p in model.student.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)
    assert model.student.backbone.bottom_up.stem.conv1.weight.grad.any()


def test_detection_gradients_are_untouched():
    plain, model = tiny.detector("faster_rcnn"), pair("faster_rcnn")
    sum(step(plain).values()).backward()
    losses = step(model)
    sum(v for k, v in losses.items() if k not in terms(losses)).backward()
    for a, b in zip(plain.parameters(), model.student.parameters()):
        assert torch.equal(a.grad, b.grad)


# --- who learns ------------------------------------------------------------------------------


def test_gradient_reaches_the_student_only():
    model = pair(identical=1.0)
    losses = step(model)
    sum(losses[k] for k in terms(losses)).backward()
    backbone = dict(model.student.backbone.named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.values())
    assert backbone["bottom_up.stem.conv1.weight"].grad.any()
    assert all(p.grad is None for p in model.student.head.parameters())
    assert all(p.grad is None for p in model.teacher.model.parameters())


# --- what is computed ------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """A pair, and how often its teacher and each of its losses ran."""
    model, calls = pair(), []

    def count(owner, name, label):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            calls.append(label)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    count(model.teacher, "features", "teacher")
    for name, loss in model.losses.items():
        count(loss, "forward", name)
    return model, calls


IDENTICAL = {f"distill/identical/s{s}" for s in (8, 16, 32, 64, 128)}
CROSS = {"distill/cross/s8_s16", "distill/cross/s8_s32", "distill/cross/s16_s32"}


@pytest.mark.parametrize(
    "weights, ran, names",
    [
        (None, ["teacher", "identical", "cross"], IDENTICAL | CROSS),
        (dict(identical=1.0), ["teacher", "identical"], IDENTICAL),
        (dict(identical=0.0, cross=1.0), ["cross"], CROSS),
        ({}, [], set()),
    ],
)
def test_only_what_weighs_is_computed(counted, weights, ran, names):
    model, calls = counted
    losses = step(model, None, weights)
    assert calls == ran
    assert terms(losses) == names


def test_weights_scale_the_terms():
    model = pair()
    once = step(model, None, dict(identical=1.0, cross=1.0))
    scaled = step(model, None, dict(identical=3.0, cross=0.5))
    default = step(model)
    for name in terms(once):
        kind = name.split("/")[1]
        factor = dict(identical=3.0, cross=0.5)[kind]
        assert scaled[name].item() == pytest.approx(factor * once[name].item(), rel=1e-5)
        factor = dict(identical=0.5, cross=0.25)[kind]  # the stages' own
        assert default[name].item() == pytest.approx(factor * once[name].item(), rel=1e-5)


def test_no_stages_at_all():
    model = SharedKD(student=tiny.detector("retinanet"), input_format="RGB")
    assert not terms(step(model))


# --- several sources of maps -----------------------------------------------------------------


def sourced(seeds, **names):
    """A RetinaNet, its sources by their seeds (None is ``teacher``), and stages by the source of each."""
    teachers = {k: tiny.frozen("retinanet", seed=seed) for k, seed in seeds.items()}
    main = teachers.pop(None, None)
    stages = {k: Stage(IdenticalLayer(), 0.5, teacher=name) for k, name in names.items()}
    return tiny.pair(stages, teacher=main, teachers=teachers)


def values(model, weights=None):
    return {k: v.item() for k, v in step(model, None, weights).items()}


def test_each_source_runs_once_and_only_if_an_active_stage_needs_it(monkeypatch):
    model, ran = sourced({None: 1, "far": 2, "idle": 3}, a=None, b="far", c="far"), []
    for name, source in model.sources.items():
        features = source.features
        monkeypatch.setattr(
            source, "features", lambda *args, n=name, f=features: ran.append(n) or f(*args)
        )
    for weights, expected in (
        (None, {None, "far"}),
        (dict(a=1.0, b=0.0, c=0.0), {None}),
        (dict(b=1.0, c=0.5), {"far"}),
        (dict(c=1.0), {"far"}),
        (dict(a=0.0), set()),
    ):
        ran.clear()
        step(model, None, weights)
        assert len(ran) == len(expected) and set(ran) == expected, weights


def test_each_stage_gets_the_maps_of_the_source_that_it_names():
    model, seen = sourced({None: 1, "far": 2}, a=None, b="far"), {}
    for name, loss in model.losses.items():
        loss.forward = lambda batch, n=name, f=loss.forward: seen.update({n: batch}) or f(batch)
    found = values(model)
    for name, source in (("a", None), ("b", "far")):
        teacher = model.sources[source]
        images = teacher.preprocess(records(), "RGB", 32).tensor
        with torch.no_grad():
            own = teacher.model.backbone(images)
        for level, (_, x) in zip(
            "p3 p4 p5 p6 p7".split(), sorted(seen[name].teacher["fpn"].items())
        ):
            assert torch.allclose(x, own[level][..., : x.shape[-2], : x.shape[-1]], atol=1e-5)
    assert all(seen["a"].student["fpn"][s] is seen["b"].student["fpn"][s] for s in (8, 128))
    alone = {**values(sourced({None: 1}, a=None)), **values(sourced({"far": 2}, b="far"))}
    assert found == alone and found["distill/a/s8"] != found["distill/b/s8"]


# --- which pixels ----------------------------------------------------------------------------


def compared(model, batch):
    """What the identical-layer loss is given."""
    seen, loss = [], model.losses["identical"]
    forward = loss.forward
    loss.forward = lambda batch: seen.append(batch) or forward(batch)
    step(model, batch)
    return seen[0]


def test_a_teacher_that_pads_more_shows_the_same_pixels():
    """96 pixels for the student, 128 for the teacher; of level 2, which only the teacher has, too.

    It takes part in the shared targets: pooling another region would shift these.
    """
    model = pair("retinanet", "faster_rcnn", identical=1.0)
    model.teacher.model.backbone._size_divisibility = 64
    batch = [tiny.record(80, 96, BOXES, seed=1), tiny.record(96, 70, BOXES, seed=2)]
    seen, detector = compared(model, batch), model.teacher.model
    with torch.no_grad():
        images = detector.preprocess_image(batch).tensor
        assert images.shape[-2:] == (128, 128)
        alone = detector.backbone(images)
    for (stride, x), name in zip(sorted(seen.teacher["fpn"].items()), "p2 p3 p4 p5 p6".split()):
        cells = -(-96 // stride)
        assert torch.equal(x, alone[name][..., :cells, :cells])
        assert stride == 4 or seen.student["fpn"][stride].shape[-2:] == (cells, cells)
    assert seen.image_sizes == [(80, 96), (96, 70)]  # before padding
    assert [len(x["instances"]) for x in seen.inputs] == [2, 2]


def test_teacher_of_another_channel_order_sees_its_own():
    """Twins, one of which was trained on BGR: their maps agree when each gets its own order."""
    student, teacher = tiny.detector("retinanet"), tiny.detector("retinanet")
    weight = teacher.backbone.bottom_up.stem.conv1.weight
    weight.data = weight.data.flip(1)
    for name in ("pixel_mean", "pixel_std"):
        getattr(teacher, name).copy_(getattr(student, name).flip(0))
    for each in (student, teacher):
        each.eval()
    stages = dict(identical=Stage(IdenticalLayer(share="none")))
    model = tiny.pair(stages, student, FrozenTeacher(teacher, "", "BGR"))
    model.training = True  # the student's normalisation stays that of inference
    student.training = True
    losses = step(model)
    assert all(losses[k].item() < 1e-8 for k in terms(losses))
    model.teacher.input_format = "RGB"
    losses = step(model)
    assert all(losses[k].item() > 1e-6 for k in terms(losses))


# --- a teacher without the tap that only the student uses ------------------------------------


def test_teacher_without_a_bottom_up_network_and_student_only_backbone_stage():
    """A C4 or DC5 teacher has one tap; a teacher-free stage on the other tap does not need it."""
    teacher = tiny.detector("retinanet", seed=1)
    teacher.backbone = teacher.backbone.bottom_up
    model = tiny.pair(stages(), teacher=FrozenTeacher(teacher, "", "RGB"))
    assert terms(step(model)) == CROSS | {f"distill/identical/s{s}" for s in (8, 16, 32)}


# --- building --------------------------------------------------------------------------------


def fails(start, build):
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value).startswith(start) and "\n" not in str(error.value)


def test_a_student_that_does_not_say_its_image_format_takes_any():
    assert SharedKD(student=tiny.detector("fcos"), input_format="BGR").input_format == "BGR"


def test_a_student_of_one_level_has_nothing_to_compare_across():
    """The default recipe goes on without its cross-layer part; that part alone is refused."""
    student = tiny.detector("retinanet")
    student.backbone = student.backbone.bottom_up
    student.backbone._out_features = ["res4"]
    model = tiny.pair(stages(), student, "retinanet")
    assert list(model.stages) == list(model.losses) == ["identical"]
    fails(
        "model.stages=cross: none of them has anything to compare",
        lambda: tiny.pair(stages(cross=1.0), student, None),
    )


def test_boxes_that_are_missing_are_named_before_anything_is_computed():
    fgd = FGD(foreground=1.0, background=1.0, attention=1.0, global_=1.0)
    model = tiny.pair(dict(fgd=Stage(fgd)))
    bare = [{k: v for k, v in x.items() if k != "instances"} for x in records()]
    model.check_record(records()[0])
    for check in (lambda: model.check_record(bare[0]), lambda: step(model, bare)):
        fails("model.stages.fgd.loss=FGD: needs the boxes of objects", check)


def test_a_keypoint_student_trains_in_channels_last():
    """Its head keeps the usual layout, in which Detectron2's keypoint loss can view its maps."""
    student = families.model_of(families.BY_NAME["Keypoint R-CNN"], 0)
    model = tiny.pair(stages(identical=1.0), student, "faster_rcnn").train()
    model.to(memory_format=torch.channels_last)
    weights = model.student.backbone.bottom_up.stem.conv1.weight
    assert weights.is_contiguous(memory_format=torch.channels_last)
    losses = step(model, families.records(model.student, 3))
    sum(losses.values()).backward()
    assert losses["loss_keypoint"] > 0
    with torch.no_grad():
        model.eval()(records())


def test_a_plain_keypoint_detector_in_channels_last():
    """As the trainer places one: the baseline of such a student."""
    cfg = tiny.config("custom_coco_plain.py")
    cfg.train.update(device="cpu", channels_last=True)
    detector = families.model_of(families.BY_NAME["Keypoint R-CNN"], 0)
    placed = parts._place(cfg, detector)
    assert placed is detector
    assert step(detector, families.records(detector, 3))["loss_keypoint"] > 0


def test_a_copy_is_independent():
    model = pair(identical=1.0)
    other = copy.deepcopy(model)
    losses = step(other)
    assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in step(model).items()}
    sum(losses.values()).backward()
    assert all(p.grad is None for p in model.parameters())


# --- classic yaml configs --------------------------------------------------------------------


def test_classic_config_with_the_published_weights(tmp_path):
    """tests/e2e/test_distil.py trains pairs of classic configs."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    config, weights = tmp_path / "teacher.yaml", tmp_path / "teacher.pth"
    config.write_text(cfg.dump())
    torch.manual_seed(1)
    teacher = build_model(cfg)
    torch.save({"model": teacher.state_dict()}, weights)
    add_sharedkd_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SharedKD"
    cfg.MODEL.SHAREDKD.STUDENT = "RetinaNet"
    cfg.MODEL.SHAREDKD.METHOD = "shared_kd_published"
    cfg.MODEL.SHAREDKD.TEACHER.CONFIG, cfg.MODEL.SHAREDKD.TEACHER.WEIGHTS = (
        str(config),
        str(weights),
    )
    model = build_model(cfg)
    assert type(model) is SharedKD and type(model.student) is type(teacher)
    assert model.teacher.fingerprint == fingerprint(teacher)  # of the weights as loaded
    scores = [x.head.cls_score.weight for x in (teacher, model.student)]
    assert torch.equal(*scores)
    cfg.MODEL.SHAREDKD.INHERIT = ["tail"]
    with pytest.raises(ConfigError, match=r"^MODEL.SHAREDKD.INHERIT=\['tail'\]: no such part"):
        build_model(cfg)
    cfg.MODEL.SHAREDKD.INHERIT = []
    assert not torch.equal(scores[0], build_model(cfg).student.head.cls_score.weight)
    assert [s.weight for s in model.stages.values()] == [2, 2]
    assert all(s.loss.distance.normalize == "none" for s in model.stages.values())
    cfg.MODEL.SHAREDKD.METHOD, cfg.MODEL.SHAREDKD.WEIGHT = "pkd:auto", 2.0
    cfg.MODEL.SHAREDKD.DECAY = 0.2
    stages = build_model(cfg).stages.values()
    assert [(s.share, s.decay) for s in stages] == [(2 * Stage.share, 0.2)]


# --- what is no pair ----------------------------------------------------------------------------


def test_several_teachers_in_a_list_and_a_pair_as_student_are_refused_with_what_to_do():
    inner = pair(identical=1.0)
    student, teacher = tiny.detector("retinanet"), inner.teacher
    with pytest.raises(ConfigError, match=r"^model.teacher=list: is no source.*model.teachers"):
        SharedKD(student=student, teacher=[teacher, teacher], input_format="RGB")
    with pytest.raises(ConfigError, match="^model.student=SharedKD: is a pair itself"):
        SharedKD(student=inner, teacher=teacher, input_format="RGB")
