"""Student and teacher side by side: who is trained, what is computed, and which pixels are compared."""

import copy
from functools import lru_cache

import families
import pytest
import tiny
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import EventStorage

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


def frozen(model):
    return FrozenTeacher(model, weights="", input_format="RGB")


def pair(student="retinanet", teacher="retinanet", **weights):
    return SharedKD(
        student=tiny.detector(student),
        teacher=None if teacher is None else frozen(tiny.detector(teacher, seed=1)),
        stages=stages(**weights),
        input_format="RGB",
    )


def step(model, batch=None, *args):
    torch.manual_seed(0)
    with EventStorage(0):
        return model(records() if batch is None else batch, *args)


def terms(losses):
    return {k for k in losses if k.startswith("distill/")}


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


# --- the student is unchanged ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["mask_rcnn", "fcos"])
def test_inference_is_the_students_own(family):
    model = pair(family).eval()
    plain = tiny.detector(family).eval()
    plain.load_state_dict(model.state_dict())
    for each in (plain, model.student):
        if hasattr(each, "roi_heads"):
            predictors = each.roi_heads.box_predictor
            is_list = isinstance(predictors, torch.nn.ModuleList)
            for predictor in predictors if is_list else [predictors]:
                predictor.test_score_thresh = 0.0
        else:
            each.test_score_thresh = 0.0
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


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_step_leaves_the_losses_and_classes_of_the_student_alone(family):
    plain, model = tiny.detector(family), pair(family)
    classes = [(name, type(m)) for name, m in plain.named_modules()]
    assert [(name, type(m)) for name, m in model.student.named_modules()] == classes
    expected = step(plain)
    losses = step(model)
    sum(losses.values()).backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert [(name, type(m)) for name, m in model.student.named_modules()] == classes
    assert terms(losses)
    assert {k: v.item() for k, v in losses.items() if k not in terms(losses)} == {
        k: v.item() for k, v in expected.items()
    }


def test_detection_gradients_are_untouched():
    plain, model = tiny.detector("faster_rcnn"), pair("faster_rcnn")
    sum(step(plain).values()).backward()
    losses = step(model)
    sum(v for k, v in losses.items() if k not in terms(losses)).backward()
    for a, b in zip(plain.parameters(), model.student.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_no_parameter_is_added():
    model, plain = pair(), tiny.detector("retinanet")
    assert [p.shape for p in model.parameters()] == [p.shape for p in plain.parameters()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert sum(p.numel() for p in model.losses.parameters()) == 0


def test_a_plain_students_state_can_be_loaded():
    model, plain = pair(), tiny.detector("retinanet", seed=7)
    model.load_state_dict(plain.state_dict())
    assert same(model.student.state_dict(), plain.state_dict())


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


def test_training_leaves_the_teacher_as_it_was():
    model = pair(identical=1.0, cross=1.0)
    before = snapshot(model.teacher.model)
    assert any("running_mean" in k for k in before)
    student = snapshot(model.student)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        sum(step(model).values()).backward()
        optimizer.step()
    assert same(model.teacher.model.state_dict(), before)
    assert not torch.equal(
        model.student.state_dict()["head.cls_score.weight"], student["head.cls_score.weight"]
    )


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
        (dict(identical=1.0, cross=0.0), ["teacher", "identical"], IDENTICAL),
        (dict(identical=1.0), ["teacher", "identical"], IDENTICAL),
        (dict(identical=0.0, cross=1.0), ["cross"], CROSS),
        (dict(identical=0.0, cross=0.0), [], set()),
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


def test_terms_are_float32_under_autocast():
    model = pair()
    with torch.autocast("cpu", torch.bfloat16):
        losses = step(model)
    assert all(losses[k].dtype == torch.float32 and losses[k].isfinite() for k in terms(losses))


def test_teacher_free():
    model = pair(teacher=None, cross=1.0)
    assert model.teacher is None
    losses = step(model)
    assert terms(losses) == CROSS
    sum(losses.values()).backward()
    assert model.student.backbone.bottom_up.stem.conv1.weight.grad.any()
    model.to(torch.float64).to(torch.float32)


def test_no_stages_at_all():
    model = SharedKD(student=tiny.detector("retinanet"), input_format="RGB")
    assert not terms(step(model))


def test_a_student_that_writes_into_its_maps_is_still_compared_by_its_outputs():
    expected = step(pair("fcos"))
    model = pair("fcos")
    forward = model.student.head.forward

    def clearing(features):
        copies = [x.clone() for x in features]
        for x in features:
            x.mul_(0)
        return forward(copies)

    model.student.head.forward = clearing
    for _ in range(2):  # the batch's own statistics normalise: no step depends on the one before
        losses = step(model)
        for name in terms(expected):
            assert losses[name].item() == expected[name].item()


# --- every family with every family ----------------------------------------------------------


@lru_cache(maxsize=None)
def shared_student(family):
    return tiny.detector(family)


@lru_cache(maxsize=None)
def shared_teacher(family):
    return frozen(tiny.detector(family, seed=1))


def levels(family):
    one_stage = family in ("retinanet", "fcos")
    return (
        ((8, 16, 32, 64, 128), (8, 16, 32)) if one_stage else ((4, 8, 16, 32, 64), (4, 8, 16, 32))
    )


#: Each family once as the student and once as the teacher; all pairs of them in the nightly tests.
PAIRS = [
    pytest.param(
        s, t, ("half", "empty")[i % 2], marks=() if (i + 2) % 5 == k else pytest.mark.nightly
    )
    for i, s in enumerate(tiny.FAMILIES)
    for k, t in enumerate(tiny.FAMILIES)
]


@pytest.mark.parametrize("student, teacher, ground_truth", PAIRS)
def test_every_pair_trains(student, teacher, ground_truth):
    detector = shared_student(student)
    model = SharedKD(
        student=detector, teacher=shared_teacher(teacher), stages=stages(), input_format="RGB"
    )
    (fpn, backbone), (other, _) = levels(student), levels(teacher)
    expected = {f"distill/identical/s{s}" for s in fpn if s in other}
    expected |= {f"distill/cross/s{a}_s{b}" for a in backbone for b in backbone if a < b}
    losses = step(model, records(ground_truth))
    assert terms(losses) == expected
    assert all(v.isfinite() and v.dim() == 0 for v in losses.values())
    assert all(losses[k] > 0 for k in expected)
    detector.zero_grad()
    sum(losses.values()).backward()
    grads = [p.grad for p in detector.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)
    assert detector.backbone.bottom_up.stem.conv1.weight.grad.any()


# --- several sources of maps -----------------------------------------------------------------


def sourced(seeds, teachers, **names):
    """A RetinaNet, its sources by their seeds, and stages by the source that each names.

    Args:
        seeds: source -> seed of its detector; None is ``teacher``.
        teachers: source -> its teacher, made here if it is missing.
        names: stage -> source.
    """
    for name, seed in seeds.items():
        if name not in teachers:
            teachers[name] = frozen(tiny.detector("retinanet", seed=seed))
    return SharedKD(
        student=tiny.detector("retinanet"),
        teacher=teachers.get(None),
        teachers={k: t for k, t in teachers.items() if k is not None},
        stages={k: Stage(IdenticalLayer(), 0.5, teacher=name) for k, name in names.items()},
        input_format="RGB",
    )


def values(model, weights=None):
    return {k: v.item() for k, v in step(model, None, weights).items()}


def test_each_source_runs_once_and_only_if_an_active_stage_needs_it(monkeypatch):
    model, ran = sourced({None: 1, "far": 2, "idle": 3}, {}, a=None, b="far", c="far"), []
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
    model, seen = sourced({None: 1, "far": 2}, {}, a=None, b="far"), {}
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
    alone = {**values(sourced({None: 1}, {}, a=None)), **values(sourced({"far": 2}, {}, b="far"))}
    assert found == alone and found["distill/a/s8"] != found["distill/b/s8"]


def test_two_names_of_one_teacher_equal_the_single_teacher():
    """Byte for byte: losses, gradients, and the student after a step."""
    one = frozen(tiny.detector("retinanet", seed=1))
    states = []
    for teachers, names in (
        ({None: one}, dict(a=None, b=None)),
        ({"near": one, "far": one}, dict(a="near", b="far")),
    ):
        model = sourced({}, teachers, **names)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses = step(model)
        sum(losses.values()).backward()
        optimizer.step()
        gradients = {k: p.grad for k, p in model.student.named_parameters() if p.grad is not None}
        states.append((losses, gradients, model.state_dict()))
    assert all(same(*found) for found in zip(*states))


def test_a_source_that_is_not_there():
    fails(
        "model.stages.a.teacher=other: is no source of maps",
        lambda: sourced({"far": 2}, {}, a="other"),
    )
    with pytest.raises(ConfigError, match="model.teachers: far$"):
        sourced({"far": 2}, {}, a="other")


# --- which pixels ----------------------------------------------------------------------------


def compared(model, batch):
    """What the identical-layer loss is given."""
    seen, loss = [], model.losses["identical"]
    forward = loss.forward
    loss.forward = lambda batch: seen.append(batch) or forward(batch)
    step(model, batch)
    return seen[0]


def differently_padded(student, teacher):
    """A 96-pixel batch is 96 pixels wide for the student, and 128 for the teacher."""
    model = pair(student, teacher, identical=1.0)
    model.teacher.model.backbone._size_divisibility = 64
    return model, [tiny.record(80, 96, BOXES, seed=1), tiny.record(96, 70, BOXES, seed=2)]


def teacher_alone(model, batch):
    """The teacher's own maps of the batch, padded to 128 pixels, with their names."""
    detector = model.teacher.model
    with torch.no_grad():
        images = detector.preprocess_image(batch).tensor
        assert images.shape[-2:] == (128, 128)
        return detector.backbone(images)


@pytest.mark.parametrize(
    "family, names", [("retinanet", "p3 p4 p5 p6 p7"), ("faster_rcnn", "p2 p3 p4 p5 p6")]
)
def test_a_teacher_that_pads_more_shows_the_same_pixels(family, names):
    model, batch = differently_padded(family, family)
    seen = compared(model, batch)
    alone = teacher_alone(model, batch)
    for (stride, x), name in zip(sorted(seen.teacher["fpn"].items()), names.split()):
        cells = -(-96 // stride)
        assert seen.student["fpn"][stride].shape[-2:] == x.shape[-2:] == (cells, cells)
        assert torch.equal(x, alone[name][..., :cells, :cells])


def test_lower_levels_that_only_the_teacher_has_show_the_same_pixels_too():
    """They take part in the shared targets: pooling another region would shift these."""
    model, batch = differently_padded("retinanet", "faster_rcnn")
    seen = compared(model, batch)
    assert seen.teacher["fpn"][8].shape[-2:] == (12, 12)
    assert seen.teacher["fpn"][4].shape[-2:] == (24, 24)
    assert torch.equal(seen.teacher["fpn"][4], teacher_alone(model, batch)["p2"][..., :24, :24])


def test_image_sizes_are_those_before_padding():
    seen = compared(pair(identical=1.0), records())
    assert seen.image_sizes == [(48, 64), (64, 60)]
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
    model = SharedKD(
        student=student,
        teacher=FrozenTeacher(teacher, "", "BGR"),
        stages=dict(identical=Stage(IdenticalLayer(share="none"))),
        input_format="RGB",
    )
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
    model = SharedKD(
        student=tiny.detector("retinanet"),
        teacher=frozen(teacher),
        stages=stages(),
        input_format="RGB",
    )
    assert terms(step(model)) == CROSS | {f"distill/identical/s{s}" for s in (8, 16, 32)}


# --- building --------------------------------------------------------------------------------


def fails(start, build):
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value).startswith(start) and "\n" not in str(error.value)


def test_contradicting_image_formats():
    detector = tiny.detector("retinanet")
    fails(
        "dataloader.train.mapper.image_format=BGR: contradicts the student's input_format=RGB",
        lambda: SharedKD(student=detector, input_format="BGR"),
    )
    fcos = tiny.detector("fcos")  # does not say
    assert SharedKD(student=fcos, input_format="BGR").input_format == "BGR"


def test_stages_that_cannot_work():
    detector = tiny.detector("retinanet")

    def build(stage, teacher=None):
        return lambda: SharedKD(
            student=detector, teacher=teacher, stages={"mine": stage}, input_format="RGB"
        )

    fails("model.stages.mine=CrossLayer", build(CrossLayer()))
    fails("model.stages.mine=2.0: is not a Stage", build(2.0))
    fails("model.stages.mine.weight=-1", build(Stage(CrossLayer(), weight=-1)))
    fails("model.stages.mine.loss=IdenticalLayer: needs a teacher", build(Stage(IdenticalLayer())))
    fails("model.stages.mine.loss.strides=[4]", build(Stage(CrossLayer(strides=[4]))))
    teacher = shared_teacher("retinanet")
    fails(
        "model.stages.mine.loss.strides=[4, 8]",
        build(Stage(IdenticalLayer(strides=[4, 8])), teacher),
    )


def test_a_student_of_one_level_has_nothing_to_compare_across():
    """The default recipe goes on without its cross-layer part; that part alone is refused."""
    student = tiny.detector("retinanet")
    student.backbone = student.backbone.bottom_up
    student.backbone._out_features = ["res4"]
    model = SharedKD(
        student=student, teacher=shared_teacher("retinanet"), stages=stages(), input_format="RGB"
    )
    assert list(model.stages) == list(model.losses) == ["identical"]
    fails(
        "model.stages=cross: none of them has anything to compare",
        lambda: SharedKD(student=student, stages=stages(cross=1.0), input_format="RGB"),
    )


def test_boxes_that_are_missing_are_named_before_anything_is_computed():
    fgd = FGD(foreground=1.0, background=1.0, attention=1.0, global_=1.0)
    model = SharedKD(
        student=tiny.detector("retinanet"),
        teacher=shared_teacher("retinanet"),
        stages=dict(fgd=Stage(fgd)),
        input_format="RGB",
    )
    bare = [{k: v for k, v in x.items() if k != "instances"} for x in records()]
    model.check_record(records()[0])
    for check in (lambda: model.check_record(bare[0]), lambda: step(model, bare)):
        fails("model.stages.fgd.loss=FGD: needs the boxes of objects", check)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_keypoint_student_trains_in_any_layout(layout):
    """Its head keeps the usual layout, in which Detectron2's keypoint loss can view its maps."""
    model = SharedKD(
        student=families.model_of(families.BY_NAME["Keypoint R-CNN"], 0),
        teacher=shared_teacher("faster_rcnn"),
        stages=stages(identical=1.0),
        input_format="RGB",
    ).train()
    model.to(memory_format=layout)
    weights = model.student.backbone.bottom_up.stem.conv1.weight
    assert weights.is_contiguous(memory_format=layout)
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


def classic():
    cfg = get_cfg()
    add_sharedkd_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.MODEL.RETINANET.NUM_CLASSES = tiny.CLASSES
    return cfg


@pytest.fixture
def classic_pair(tmp_path):
    """A classic config, its teacher's yaml and the teacher's weights."""
    plain = classic()
    del plain.MODEL["SHAREDKD"]
    (tmp_path / "teacher.yaml").write_text(plain.dump())
    torch.manual_seed(1)
    teacher = build_model(plain)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    cfg = classic()
    cfg.MODEL.META_ARCHITECTURE = "SharedKD"
    cfg.MODEL.SHAREDKD.STUDENT = "RetinaNet"
    keys = "MODEL.SHAREDKD.TEACHER"
    cfg.merge_from_list(
        [
            f"{keys}.CONFIG",
            str(tmp_path / "teacher.yaml"),
            f"{keys}.WEIGHTS",
            str(tmp_path / "teacher.pth"),
        ]
    )
    return cfg, teacher


def test_classic_config(classic_pair):
    assert META_ARCH_REGISTRY.get("SharedKD") is SharedKD
    cfg, teacher = classic_pair
    model = build_model(cfg)
    assert type(model) is SharedKD and type(model.student) is type(teacher)
    assert model.teacher.fingerprint == fingerprint(teacher)  # of the weights as loaded
    assert set(model.stages) == {"identical"} and model.stages["identical"].auto
    losses = step(model, None, dict(identical=1.0))
    assert "distill/identical/s8" in terms(losses)
    sum(losses.values()).backward()
    model.eval()
    assert len(model(records())) == 2


def test_classic_config_with_the_published_weights(classic_pair):
    cfg, _ = classic_pair
    cfg.MODEL.SHAREDKD.METHOD = "shared_kd_published"
    stages = build_model(cfg).stages
    assert [s.weight for s in stages.values()] == [2, 2]
    assert all(s.loss.distance.normalize == "none" for s in stages.values())
    cfg.MODEL.SHAREDKD.PUBLISHED = True
    with pytest.raises(ConfigError, match="use MODEL.SHAREDKD.METHOD: shared_kd_published"):
        build_model(cfg)


# --- a teacher in lower precision ---------------------------------------------------------------


def test_a_teacher_in_bfloat16_gives_nearly_the_same_gradient():
    """What distillation tells the student's backbone differs by less than a hundredth."""
    family = "retinanet"
    gradients = []
    for precision in ("float32", "bfloat16"):
        teacher = FrozenTeacher(tiny.detector(family, seed=1), "", "RGB", precision=precision)
        teacher.prepare()
        model = SharedKD(
            student=tiny.detector(family), teacher=teacher, stages=stages(), input_format="RGB"
        )
        losses = step(model)
        total = sum(losses[name] for name in terms(losses))
        weights = [x for x in model.student.backbone.parameters() if x.requires_grad]
        found = torch.autograd.grad(total, weights, allow_unused=True)
        gradients.append(torch.cat([x.flatten() for x in found if x is not None]).double())
    exact, lower = gradients
    assert 0 < (lower - exact).norm() < 0.01 * exact.norm()


# --- what is no pair ----------------------------------------------------------------------------


def test_several_teachers_in_a_list_and_a_pair_as_student_are_refused_with_what_to_do():
    inner = pair(identical=1.0)
    student, teacher = tiny.detector("retinanet"), inner.teacher
    with pytest.raises(ConfigError, match=r"^model.teacher=list: is no source.*model.teachers"):
        SharedKD(student=student, teacher=[teacher, teacher], input_format="RGB")
    with pytest.raises(ConfigError, match="^model.student=SharedKD: is a pair itself"):
        SharedKD(student=inner, teacher=teacher, input_format="RGB")


@pytest.mark.parametrize("family", ["retinanet", "faster_rcnn"])
def test_an_image_without_labels_is_refused(family):
    model, records = pair(family, family, identical=1.0), tiny.batch()
    del records[1]["instances"]
    with pytest.raises(ConfigError, match="an image without labels; leave it out, or give it no"):
        with EventStorage():
            model.train()(records)
