"""Taking feature maps from real detectors, also from ones that write into them."""

import pytest
import tiny
import torch
from detectron2.utils.events import EventStorage

from sharedkd.errors import ConfigError
from sharedkd.modeling.taps import FeatureTap, common_pixels, pyramid_shapes

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


def relu_its_maps(detector, when=lambda step: True):
    """Make the detector's head write into the maps that it is given."""
    steps = iter(range(1000))
    original = detector.head.forward

    def forward(features):
        if when(next(steps)):
            for x in features:
                x.relu_()
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


def test_a_map_that_nobody_writes_into_is_handed_out_itself(retinanet):
    tap, seen = FeatureTap(retinanet), []
    retinanet.head.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for step in range(2):
        with tap.capture({FPN}) as maps:
            train_step(retinanet)
        assert maps[FPN][8] is seen[step]


def test_a_head_that_writes_into_its_maps(retinanet):
    relu_its_maps(retinanet)
    tap = FeatureTap(retinanet)
    retinanet.eval()
    for step in range(3):
        with tap.capture({FPN}) as maps:
            retinanet(tiny.batch())
        pyramid, _ = direct(retinanet)
        for stride, name in {8: "p3", 16: "p4", 32: "p5", 64: "p6", 128: "p7"}.items():
            assert torch.equal(maps[FPN][stride], pyramid[name]), (step, stride)
            assert (maps[FPN][stride] < 0).any()


def test_a_writing_head_can_be_trained(retinanet):
    relu_its_maps(retinanet)
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
    relu_its_maps(retinanet, when=lambda step: step > 0)
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
    relu_its_maps(retinanet)
    tap = FeatureTap(retinanet)
    with pytest.raises(KeyError):
        with tap.capture({FPN}):
            raise KeyError
    with tap.capture({FPN}) as maps:
        train_step(retinanet)
    assert (maps[FPN][8] < 0).any()


def test_a_model_without_a_backbone():
    for model in (torch.nn.Linear(1, 1), torch.nn.Sequential()):
        with pytest.raises(
            ConfigError, match=rf"^model.pyramid=null: {type(model).__name__} .*backbone"
        ):
            FeatureTap(model)


def levels(**sizes):
    """Maps of the FPN that number their positions: stride -> (1, 1, H, W)."""
    return {FPN: {int(k[1:]): torch.arange(h * w).view(1, 1, h, w) for k, (h, w) in sizes.items()}}


def shapes(maps):
    return {s: tuple(x.shape[-2:]) for s, x in maps[FPN].items()}


def test_canvases_that_differ_are_cut_to_the_pixels_of_both():
    # 96 x 64 pixels and 128 x 128, with a level of each that the other lacks
    student = levels(s8=(12, 8), s64=(2, 1), s128=(1, 1))
    teacher = levels(s4=(32, 32), s8=(16, 16), s64=(2, 2))
    ours, theirs = common_pixels(student, teacher)
    assert all(ours[FPN][s] is x for s, x in student[FPN].items())
    assert shapes(theirs) == {4: (24, 16), 8: (12, 8), 64: (2, 1)}
    assert theirs[FPN][64].tolist() == [[[[0], [2]]]]
    assert theirs[FPN][8][0, 0, 1, :2].tolist() == [16, 17]


def test_each_side_may_show_more_than_the_other():
    ours, theirs = common_pixels(
        levels(s8=(16, 8), s16=(8, 4)), levels(s8=(8, 16), s4=(16, 32), s16=(4, 8))
    )
    assert shapes(ours) == {8: (8, 8), 16: (4, 4)}
    assert shapes(theirs) == {8: (8, 8), 4: (16, 16), 16: (4, 4)}
    assert ours[FPN][8][0, 0, 1].tolist() == list(range(8, 16))
    assert theirs[FPN][8][0, 0, 1].tolist() == list(range(16, 24))


def test_a_backbone_that_rounds_sizes_down_is_compared_with_one_that_rounds_them_up():
    ours, theirs = common_pixels(levels(s8=(13, 13), s16=(7, 7)), levels(s8=(12, 12), s16=(6, 6)))
    assert shapes(ours) == shapes(theirs) == {8: (12, 12), 16: (6, 6)}


def test_a_wrong_stride_is_refused():
    with pytest.raises(ConfigError, match=r"^model.teacher=6x6: .* stride 16 .* 12x12"):
        common_pixels(levels(s4=(24, 24), s16=(12, 12)), levels(s4=(24, 24), s16=(6, 6)))


# --- other modules than the backbone ------------------------------------------------------------


class Necked(torch.nn.Module):
    """A detector whose pyramid is a neck over its backbone; it returns a list, or what ``pack`` makes."""

    def __init__(self, pack=list):
        super().__init__()
        self.backbone = tiny.detector("retinanet").backbone.bottom_up
        self.neck = torch.nn.Module()
        self.neck.narrow = torch.nn.Conv2d(128, 4, 1)
        self.neck.forward = lambda maps: pack(
            [self.neck.narrow(maps["res3"]), maps["res4"], maps["res4"][:, :5, ::4, ::4]]
        )
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1))

    def forward(self, inputs):
        images = torch.stack([x["image"].float() for x in inputs])
        self.seen = self.neck(self.backbone(images))
        return {"loss": sum(x.mean() for x in self.seen)} if self.training else []


RECORDS = [tiny.record(64, 96, seed=1)]


@pytest.mark.parametrize("pack", [list, lambda maps: (maps[0], {"more": maps[1:]}, None)])
def test_a_module_without_output_shape_is_measured(pack):
    model = Necked(pack).train()
    model.backbone.stages[0].eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    tap = FeatureTap(model, "neck")
    assert torch.equal(torch.rand(1), expected)  # the state of the generator is as it was
    assert [m.training for m in model.modules()] == modes and hooks(model) == 0
    assert tap.shapes[FPN] == {8: 4, 16: 256, 64: 5}
    assert tap.shapes[BACKBONE] == {8: 128, 16: 256, 32: 512}
    with tap.capture({FPN, BACKBONE}) as maps:
        model.eval()(RECORDS) if pack is list else model.neck(
            model.eval().backbone(RECORDS[0]["image"][None].float())
        )
    assert shapes(maps) == {8: (8, 12), 16: (4, 6), 64: (1, 2)}


@pytest.mark.parametrize(
    "where, words",
    [
        ("nek", r"Necked has no such module; use one in \['backbone', 'neck'\]"),
        ("neck.narrow.none", "has no such module"),
        ("unused", "is not called in a forward"),
        ("logit", "returns no maps"),
    ],
)
def test_a_module_that_is_no_pyramid(where, words):
    model = Necked()
    if where in ("unused", "logit"):
        setattr(model, where, torch.nn.AdaptiveAvgPool2d(1))
    if where == "logit":
        model.logit = torch.nn.Flatten()
        model.neck.register_forward_hook(
            lambda module, args, output: model.logit(output[0]) and None
        )
    with pytest.raises(ConfigError, match=f"^model.pyramid={where}: .*{words}"):
        FeatureTap(model, where)


def test_two_outputs_of_one_stride_are_refused():
    with pytest.raises(ConfigError, match=r"several outputs of stride 16 \(1, 3\)"):
        FeatureTap(Necked(lambda maps: [*maps, maps[1]]), "neck")
    model = tiny.detector("faster_rcnn")
    strides = model.backbone._out_feature_strides
    strides["p5"] = strides["p4"]
    with pytest.raises(
        ConfigError, match=r"^model.pyramid=null: FPN has several outputs of stride 16"
    ):
        FeatureTap(model)


def test_a_backbone_that_runs_twice_is_refused():
    model = Necked()
    forward = model.backbone.forward
    twice = torch.nn.Module()
    twice.backbone = model.backbone
    with pytest.raises(ConfigError, match="^model.pyramid=null: .*more than once in a step"):
        with FeatureTap(twice).capture({FPN}):
            for _ in range(2):
                model.backbone.eval()(torch.zeros(1, 3, 32, 32))
    assert model.backbone.forward == forward


def test_a_backbone_without_a_bottom_up_network_is_its_own():
    model = tiny.detector("retinanet")
    model.backbone = model.backbone.bottom_up
    assert (
        pyramid_shapes(model)[BACKBONE] == pyramid_shapes(model)[FPN] == {8: 128, 16: 256, 32: 512}
    )
