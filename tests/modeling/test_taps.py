"""Taking feature maps from real detectors, also from ones that write into them."""

import pytest
import tiny
import torch
from detectron2.utils.events import EventStorage

from sharedkd.errors import ConfigError
from sharedkd.modeling.taps import FeatureTap, pyramid_shapes, same_pixels

FPN, BACKBONE = "fpn", "backbone"


@pytest.fixture
def retinanet():
    return tiny.detector("retinanet")


def train_step(detector):
    with EventStorage(0):
        return detector(tiny.batch())


def direct(detector):
    """The maps of tiny.batch(), by calling the networks."""
    images = detector.preprocess_image(tiny.batch()).tensor
    return detector.backbone(images), detector.backbone.bottom_up(images)


def hooks(detector):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in detector.modules())


def write_into_maps(detector, change, when=lambda step: True):
    """Make the detector's head write into the maps that it is given."""
    steps = iter(range(1000))
    original = detector.head.forward

    def forward(features):
        if when(next(steps)):
            for x in features:
                change(x)
        return original(features)

    detector.head.forward = forward


@pytest.mark.parametrize(
    "family, fpn",
    [
        ("faster_rcnn", {4: "p2", 8: "p3", 16: "p4", 32: "p5", 64: "p6"}),
        ("retinanet", {8: "p3", 16: "p4", 32: "p5", 64: "p6", 128: "p7"}),
        ("fcos", {8: "p3", 16: "p4", 32: "p5", 64: "p6", 128: "p7"}),
    ],
)
def test_capture_by_stride(family, fpn):
    detector = tiny.detector(
        family
    ).eval()  # so that both passes normalise with the same statistics
    with FeatureTap(detector).capture({FPN, BACKBONE}) as maps:
        detector(tiny.batch())
    pyramid, stages = direct(detector)
    assert {s: x.shape for s, x in maps[FPN].items()} == {
        s: pyramid[n].shape for s, n in fpn.items()
    }
    for stride, name in fpn.items():
        assert torch.equal(maps[FPN][stride], pyramid[name])
    named = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
    assert sorted(maps[BACKBONE]) == [s for s in named if named[s] in stages]
    for stride, x in maps[BACKBONE].items():
        assert torch.equal(x, stages[named[stride]])


def test_shapes_are_those_of_the_maps(retinanet):
    levels = (8, 16, 32, 64, 128)
    anchors = 9
    assert pyramid_shapes(retinanet) == {
        FPN: dict.fromkeys(levels, 128),
        BACKBONE: {8: 128, 16: 256, 32: 512},
        "logits": dict.fromkeys(levels, anchors * tiny.CLASSES),
        "deltas": dict.fromkeys(levels, anchors * 4),
        "boxes": dict.fromkeys(levels, anchors * 4),
        "anchors": dict.fromkeys(levels, anchors * 4),
    }


def test_only_the_taps_asked_for(retinanet):
    with FeatureTap(retinanet).capture({BACKBONE}) as maps:
        train_step(retinanet)
    assert list(maps) == [BACKBONE]


def test_maps_are_attached_to_the_students_graph(retinanet):
    with FeatureTap(retinanet).capture({FPN}) as maps:
        train_step(retinanet)
    sum(x.sum() for x in maps[FPN].values()).backward()
    assert retinanet.backbone.bottom_up.stem.conv1.weight.grad.any()
    assert retinanet.head.cls_score.weight.grad is None


def test_a_map_that_nobody_writes_into_is_handed_out_itself(retinanet):
    tap, seen = FeatureTap(retinanet), []
    retinanet.head.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for step in range(2):
        with tap.capture({FPN}) as maps:
            train_step(retinanet)
        assert maps[FPN][8] is seen[step]


@pytest.mark.parametrize("change", [torch.Tensor.relu_, lambda x: x.mul_(0)], ids=["relu_", "mul_"])
def test_a_head_that_writes_into_its_maps(retinanet, change):
    write_into_maps(retinanet, change)
    tap = FeatureTap(retinanet)
    retinanet.eval()
    for step in range(3):
        with tap.capture({FPN}) as maps:
            retinanet(tiny.batch())
        pyramid, _ = direct(retinanet)
        for stride, name in {8: "p3", 16: "p4", 32: "p5", 64: "p6", 128: "p7"}.items():
            assert torch.equal(maps[FPN][stride], pyramid[name]), (step, stride)
            assert (maps[FPN][stride] < 0).any()  # no relu_ and no zeros


def test_a_writing_head_can_be_trained(retinanet):
    write_into_maps(retinanet, torch.Tensor.relu_)
    with FeatureTap(retinanet).capture({FPN}) as maps:
        losses = train_step(retinanet)
    (sum(losses.values()) + sum(x.square().mean() for x in maps[FPN].values())).backward()
    assert retinanet.backbone.bottom_up.stem.conv1.weight.grad.isfinite().all()


def test_an_fpn_that_writes_into_the_backbones_maps():
    detector = tiny.detector("faster_rcnn").eval()
    expected = direct(detector)[1]["res2"].clone()
    assert expected.any()

    def clear(module, args):
        args[0].mul_(0)

    detector.backbone.fpn_lateral2.register_forward_pre_hook(clear)
    tap = FeatureTap(detector)
    for _ in range(2):
        with tap.capture({FPN, BACKBONE}) as maps:
            detector(tiny.batch())
        assert torch.equal(maps[BACKBONE][4], expected)


def test_a_detector_that_begins_to_write_later_is_an_error(retinanet):
    write_into_maps(retinanet, torch.Tensor.relu_, when=lambda step: step > 0)
    tap = FeatureTap(retinanet)
    with tap.capture({FPN}):
        train_step(retinanet)
    with pytest.raises(RuntimeError, match="fpn feature maps in place"):
        with tap.capture({FPN}):
            train_step(retinanet)
    assert hooks(retinanet) == 0


def test_nothing_stays_hooked(retinanet):
    tap = FeatureTap(retinanet)
    with tap.capture({FPN, BACKBONE}):
        assert hooks(retinanet) == 2
    assert hooks(retinanet) == 0
    with pytest.raises(KeyError, match="own"):
        with tap.capture({FPN, BACKBONE}):
            train_step(retinanet)
            raise KeyError("own")
    assert hooks(retinanet) == 0


def test_an_error_leaves_the_tap_usable(retinanet):
    """A step that died says nothing about whether the detector writes."""
    write_into_maps(retinanet, torch.Tensor.relu_)
    tap = FeatureTap(retinanet)
    with pytest.raises(KeyError):
        with tap.capture({FPN}):
            raise KeyError
    with tap.capture({FPN}) as maps:
        train_step(retinanet)
    assert (maps[FPN][8] < 0).any()


def test_a_model_without_a_backbone():
    for model in (torch.nn.Linear(1, 1), torch.nn.Sequential()):
        with pytest.raises(ConfigError, match=rf"^model={type(model).__name__}: .*backbone"):
            FeatureTap(model)


def test_same_pixels_keeps_the_top_left_of_every_level():
    student = {FPN: {8: torch.zeros(1, 1, 12, 8), 64: torch.zeros(1, 1, 2, 1)}}  # 96 x 64 pixels
    teacher = {
        FPN: {s: torch.arange(n * n).view(1, 1, n, n) for s, n in ((4, 32), (8, 16), (64, 2))}
    }
    cut = same_pixels(teacher, student)[FPN]
    assert {s: tuple(x.shape[-2:]) for s, x in cut.items()} == {4: (24, 16), 8: (12, 8), 64: (2, 1)}
    assert cut[64].tolist() == [[[[0], [2]]]]
    assert cut[8][0, 0, 1, :2].tolist() == [16, 17]
    assert torch.equal(same_pixels(student, student)[FPN][8], student[FPN][8])
