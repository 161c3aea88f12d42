"""A teacher prepares its images as it would itself: channels, normalisation, padding, scale."""

import copy

import pytest
import tiny
import torch
from detectron2.config import instantiate
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, ImageList
from torch import nn

from sharedkd import ConfigError, FrozenTeacher, IdenticalLayer, SharedKD, Stage
from sharedkd.losses.base import TAPS
from sharedkd.modeling.preparation import image_channels, prepare_images

FPN = frozenset({"fpn"})
NAMES = dict(zip((4, 8, 16, 32, 64), "p2 p3 p4 p5 p6".split()))


class Padding(GeneralizedRCNN):
    """Pads as Detectron2's main does: to its backbone's `padding_constraints`, or to `square_pad`."""

    def preprocess_image(self, batched_inputs):
        images = [
            (x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs
        ]
        found = ImageList.from_tensors(images, self.backbone.size_divisibility)
        constraints = getattr(self.backbone, "padding_constraints", {})
        square = constraints.get("square_size") or getattr(self.backbone, "square_pad", 0)
        if not square:
            return found
        canvas = images[0].new_zeros(len(images), len(images[0]), square, square)
        for image, place in zip(images, canvas):
            place[..., : image.shape[-2], : image.shape[-1]].copy_(image)
        return ImageList(canvas, found.image_sizes)


def faster(channels=3, input_format="RGB", target=None, seed=0):
    node = tiny.node("faster_rcnn")
    node.backbone.bottom_up.stem.in_channels = channels
    mean = torch.linspace(90, 130, channels).tolist()
    node.update(pixel_mean=mean, pixel_std=[50.0] * channels, input_format=input_format)
    if target is not None:
        node._target_ = target
    torch.manual_seed(seed)
    return instantiate(node).eval()


def images(channels=3, sizes=((60, 90), (72, 64))):
    draw = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randint(0, 256, (channels, *size), generator=draw).to(torch.uint8)}
        for size in sizes
    ]


def constrained(kind, size):
    model = faster(target=Padding)
    if kind == "size_divisibility":
        model.backbone._size_divisibility = size
    else:
        value = size if kind == "square_pad" else {"square_size": size, "size_divisiblity": 32}
        setattr(model.backbone, kind, value)
    return model


def gray():
    return faster(1, "L")


def six():
    return faster(6, "BGR")


OWN = {
    "padding_constraints": (lambda: constrained("padding_constraints", 128), 3, (128, 128)),
    "square_pad": (lambda: constrained("square_pad", 160), 3, (160, 160)),
    "divisor": (lambda: constrained("size_divisibility", 64), 3, (128, 128)),
    "gray": (gray, 1, (96, 96)),
    "six": (six, 6, (96, 96)),
}


@pytest.mark.parametrize("kind", OWN)
def test_maps_are_those_of_its_own_preparation_and_backbone(kind):
    build, channels, canvas = OWN[kind]
    model = build()
    teacher = FrozenTeacher(copy.deepcopy(model), "")
    records = images(channels)
    with torch.no_grad():
        own = model.preprocess_image(records).tensor
        expected = model.backbone(own)
    assert own.shape[-2:] == canvas
    for divisor in (0, 32, 256):  # the student's has no say
        assert torch.equal(teacher.preprocess(records, "RGB", divisor).tensor, own)
    for prepare in (lambda: None, teacher.prepare):
        prepare()
        found = teacher.features(records, FPN, "RGB", 32)["fpn"]
        for stride, name in NAMES.items():
            torch.testing.assert_close(found[stride], expected[name], rtol=1e-4, atol=1e-4)


def test_six_channels_stay_in_order():
    model = six()
    model.pixel_mean.zero_(), model.pixel_std.fill_(1)
    image = torch.arange(6.0).view(6, 1, 1).expand(6, 32, 32)
    seen = FrozenTeacher(model, "").preprocess([{"image": image}], "RGB", 32).tensor
    assert seen[0, :, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_one_channel_becomes_three():
    seen = FrozenTeacher(faster(), "").preprocess(images(1, ((32, 32),)), "L").tensor
    raw = seen * 50 + torch.tensor([90.0, 110.0, 130.0]).view(3, 1, 1)
    expected = images(1, ((32, 32),))[0]["image"].float().expand(3, -1, -1)
    torch.testing.assert_close(raw[0], expected)


@pytest.mark.parametrize(
    "student, given, teacher, wanted",
    [
        (3, "RGB", 1, "L"),
        (6, "RGB", 3, "RGB"),
        (1, "L", 6, "L"),
        (3, "YUV-BT.601", 3, "RGB"),
    ],
)
def test_channels_that_cannot_be_converted(student, given, teacher, wanted):
    source = FrozenTeacher(faster(teacher, wanted), "")
    words = f"^model.teacher.input_format={wanted}: .*{teacher} channels, .*{student} .{given}"
    with pytest.raises(ConfigError, match=words) as error:
        source.preprocess(images(student), given)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=words):  # and as soon as the pair is built
        SharedKD(student=faster(student, given), teacher=source, input_format=given)


def test_images_that_a_teacher_crops_are_warned_of(sharedkd_log):
    """Detectron2 crops a single image, and fails on several: both are cut to the square."""
    model = constrained("padding_constraints", 64)
    teacher = FrozenTeacher(model, "")
    seen = teacher.preprocess(images(), "RGB").tensor
    assert seen.shape == (2, 3, 64, 64)
    full = ((images()[0]["image"] - model.pixel_mean) / model.pixel_std)[:, :60, :64]
    torch.testing.assert_close(seen[0, :, :60], full)
    assert (
        sharedkd_log.text.count("model.teacher: Padding crops images that are larger than 64x64")
        == 1
    )
    teacher.preprocess(images(), "RGB")
    assert sharedkd_log.text.count("crops images") == 1


def step(student, teacher, records=None, **options):
    stages = {"same": Stage(IdenticalLayer(share="none"))}
    records = records or [tiny.record(60, 90, seed=1), tiny.record(72, 64, seed=2)]
    losses = tiny.step(tiny.pair(stages, student, teacher, **options).train(), records)
    sum(losses.values()).backward()
    return {k: v.item() for k, v in losses.items() if k.startswith("distill/")}


@pytest.mark.parametrize("kind", ["padding_constraints", "six"])
def test_twins_agree_however_they_pad(kind):
    """Two models that prepare alike are never refused, and equal maps differ by nothing."""
    build, channels, _ = OWN[kind]
    student = build()
    student.train = lambda mode=True: student  # its norms stay those of inference
    student.training = True
    records = [
        {**tiny.record(*size, seed=seed), **image}
        for seed, (size, image) in enumerate(zip(((60, 90), (72, 64)), images(channels)))
    ]
    teacher = FrozenTeacher(copy.deepcopy(build()), "")
    losses = step(student, teacher, records, input_format=student.input_format)
    assert set(losses) == {f"distill/same/s{s}" for s in NAMES}
    assert max(losses.values()) < 1e-9


def test_a_teacher_that_shows_less_than_the_student():
    """A student that pads to 64 shows 128 x 128 pixels, the teacher 96 x 96."""
    student = faster()
    student.backbone._size_divisibility = 64
    losses = step(student, FrozenTeacher(faster(seed=1), ""))
    assert len(losses) == 5 and all(0 < x < float("inf") for x in losses.values())


# --- what is not one of Detectron2's own detectors ----------------------------------------------


class Normalizing(nn.Module):
    """Has a backbone, a normaliser and a text as its device."""

    def __init__(self, **attributes):
        super().__init__()
        self.backbone = faster().backbone
        self.device = "cpu"
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, inputs):
        images = prepare_images(self, inputs)
        return {"loss": sum(x.mean() for x in self.backbone(images.tensor).values())}


def halves(image):
    return image / 2


def test_a_normaliser_and_the_models_own_size_divisibility():
    model = Normalizing(normalizer=halves, size_divisibility=128)
    (record,) = images(3, ((60, 90),))
    seen = FrozenTeacher(model, "", "RGB").preprocess([record], "RGB", 32).tensor
    assert seen.shape == (1, 3, 128, 128)
    assert torch.equal(seen[0, :, :60, :90], record["image"] / 2) and not seen[..., 60:, :].any()


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_means_that_are_no_columns(kind):
    model = Normalizing(pixel_mean=kind([10.0, 20.0, 30.0]), pixel_std=kind([1.0, 2.0, 4.0]))
    image = torch.tensor([50, 60, 70], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)
    seen = FrozenTeacher(model, "", "RGB").preprocess([{"image": image}], "RGB").tensor
    assert seen[0, :, 0, 0].tolist() == [40, 20, 10]


def test_a_square_without_a_preparation_of_its_own():
    model = Normalizing(normalizer=halves)
    model.backbone.padding_constraints = {"square_size": 160}
    teacher = FrozenTeacher(model, "", "RGB")
    assert teacher.preprocess(images(), "RGB", 32).tensor.shape == (2, 3, 160, 160)


def test_the_students_divisor_where_the_teacher_has_none():
    model = Normalizing(normalizer=halves)
    model.backbone._size_divisibility = 0
    teacher = FrozenTeacher(model, "", "RGB")
    assert teacher.preprocess(images(), "RGB", 48).tensor.shape == (2, 3, 96, 96)


def test_detectron2s_preparation_without_its_means():
    model = faster()
    mean, std = model.pixel_mean, model.pixel_std
    expected = model.preprocess_image(images()).tensor
    del model.pixel_mean, model.pixel_std
    model.normalizer = lambda x: (x - mean) / std
    teacher = FrozenTeacher(model, "", "RGB")
    assert torch.equal(teacher.preprocess(images(), "RGB").tensor, expected)
    teacher.prepare()


def test_a_preparation_that_returns_more():
    model = faster()
    expected = model.preprocess_image(images())
    model.preprocess_image = lambda inputs: (expected, torch.zeros(2, 4))
    assert torch.equal(prepare_images(model, images()).tensor, expected.tensor)


def test_what_is_missing_is_named():
    teacher = FrozenTeacher(Normalizing(), "", "RGB")
    with pytest.raises(
        ConfigError, match="^model.teacher=Normalizing: .*neither.*pixel_mean.*normalizer"
    ):
        teacher.prepare()


def test_a_student_whose_device_is_a_text():
    assert len(step(Normalizing(normalizer=halves), FrozenTeacher(faster(), ""))) == 5


def test_channels_are_read_from_the_means_or_the_first_convolution():
    assert [image_channels(m) for m in (faster(), gray(), six())] == [3, 1, 6]
    assert image_channels(Normalizing()) == 3


# --- a teacher that sees more -------------------------------------------------------------------


def at_twice_the_size(records):
    options = dict(scale_factor=2, mode="bilinear")
    return [
        {"image": nn.functional.interpolate(x["image"][None].float(), **options)[0]}
        for x in records
    ]


def test_scale_shows_the_teacher_larger_images():
    """Level p3 of images at twice the size covers the pixels of stride 4."""
    model = tiny.detector("retinanet", seed=1).eval()
    records = images()
    teacher = FrozenTeacher(copy.deepcopy(model), "", "RGB", scale=2)
    found = teacher.features(records, frozenset(TAPS), "RGB", 32)
    assert sorted(teacher.shapes["fpn"]) == sorted(found["fpn"]) == [4, 8, 16, 32, 64]
    larger = at_twice_the_size(records)
    with torch.no_grad():
        pyramid = model.backbone(model.preprocess_image(larger).tensor)
    for stride, name in zip((4, 8, 16, 32, 64), "p3 p4 p5 p6 p7".split()):
        torch.testing.assert_close(found["fpn"][stride], pyramid[name])
    plain = FrozenTeacher(copy.deepcopy(model), "", "RGB").features(larger, frozenset(TAPS), "RGB")
    assert torch.equal(found["anchors"][4], plain["anchors"][8] / 2)
    assert torch.equal(found["boxes"][4], plain["boxes"][8] / 2)
    assert torch.equal(found["logits"][4], plain["logits"][8])


def test_a_scaled_teacher_prefers_the_larger_image_of_the_loader():
    teacher = FrozenTeacher(tiny.detector("retinanet", seed=1), "", "RGB", scale=2)
    plain = FrozenTeacher(tiny.detector("retinanet", seed=1), "", "RGB")
    for size, used in (((64, 96), True), ((64, 95), False)):  # one of another size is not its view
        record = {"image": torch.rand(3, 32, 48) * 255, "larger_image": torch.rand(3, *size) * 255}
        found = teacher.features([record], FPN, "RGB")["fpn"][4]
        same = plain.features([{"image": record["larger_image"]}], FPN, "RGB")["fpn"][8]
        assert (found.shape == same.shape and torch.equal(found, same)) == used


def test_regions_of_a_scaled_teacher():
    model = faster()
    boxes = [
        Boxes(torch.tensor([[3.0, 5.0, 40.0, 50.0]])),
        Boxes(torch.tensor([[10.0, 2.0, 60.0, 44.0]])),
    ]
    teacher = FrozenTeacher(model, "", "RGB", scale=2)
    found = teacher.region_predictions(teacher.features(images(), FPN, "RGB"), boxes)
    plain = FrozenTeacher(model, "", "RGB")
    larger = at_twice_the_size(images())
    twice = [Boxes(2 * x.tensor) for x in boxes]
    expected = plain.region_predictions(plain.features(larger, FPN, "RGB"), twice)
    torch.testing.assert_close(found, expected)


def test_a_scaled_teacher_in_a_step():
    teacher = FrozenTeacher(tiny.detector("retinanet", seed=1), "", "RGB", scale=2)
    assert set(step(faster(), teacher)) == {f"distill/same/s{s}" for s in (4, 8, 16, 32, 64)}


@pytest.mark.parametrize(
    "scale, words",
    [(0, "too small"), ("2", "no number"), (1.5, "makes .* of its stride .*whole number")],
)
def test_scales_that_cannot_be(scale, words):
    with pytest.raises(ConfigError, match=f"^model.teacher.scale=.*{words}"):
        FrozenTeacher(faster(), "", "RGB", scale=scale)
