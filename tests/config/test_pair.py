"""--teacher and --method: a plain detector's config becomes a pair."""

import pytest
import tiny
import torch
import torchvision

from sharedkd import ConfigError
from sharedkd.config import construct, load_config, shared_kd_stages
from sharedkd.config.pair import Pairing
from sharedkd.methods import stages_of
from sharedkd.weights.loading import initialise

ZOO = "COCO-Detection/retinanet_R_101_FPN_3x.yaml"


def load(config, *overrides):
    path = config if config.startswith(("COCO", "Misc")) else str(tiny.ROOT / "configs" / config)
    return load_config(path, overrides, without_data=True)


@pytest.mark.parametrize(
    "config, family",
    [
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "faster_rcnn"),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "retinanet"),
        ("COCO-Detection/retinanet_R_50_FPN_1x.py", "retinanet"),
        ("custom_coco_mask_plain.py", "mask_rcnn"),
    ],
)
def test_a_plain_detector_gets_the_recipe_of_its_family(config, family):
    cfg = load(config, f"distill.teacher={ZOO}", "distill.method=fgd")
    assert cfg.model.teacher.config == ZOO and cfg.model.stages == stages_of("fgd", family)
    assert stages_of("fgd", "faster_rcnn") != stages_of("fgd", "retinanet")
    assert cfg.model.input_format == cfg.dataloader.train.mapper.image_format
    assert load(config).model == cfg.model.student


def test_the_family_is_that_of_the_overridden_detector():
    keys = ["MODEL.META_ARCHITECTURE=RetinaNet", f"distill.teacher={ZOO}", "distill.method=fgd"]
    cfg = load("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", *keys)
    assert cfg.model.stages == stages_of("fgd", "retinanet")
    keys = [f"distill.teacher={ZOO}", "distill.method=shared_kd"]
    cfg = load("COCO-Detection/rpn_R_50_FPN_1x.yaml", *keys)  # of no family
    assert cfg.model.stages == shared_kd_stages()


def test_a_teacher_alone_is_a_start_and_shared_kd():
    cfg = load("retinanet_plain.py", f"distill.teacher={ZOO}")
    assert cfg.train.inherit == ["neck", "head"] and cfg.model.stages == shared_kd_stages()


def test_a_start_without_a_loss():
    keys = ["distill.method=inherit", "data.unlabelled_images=folder"]
    cfg = load("retinanet_plain.py", f"distill.teacher={ZOO}", *keys)
    assert cfg.train.inherit == ["neck", "head"] and [*cfg.model.stages] == ["_target_"]
    assert cfg.data.unlabelled_images == "folder"  # and not left out: a run refuses it


def test_overrides_name_the_plain_detector_or_the_student():
    for key in ("model", "model.student"):
        cfg = load("retinanet_plain.py", f"{key}.num_classes=7", f"distill.teacher={ZOO}")
        assert cfg.model.student.num_classes == 7


def test_other_overrides_come_after_the_pairing():
    keys = ["model.stages.fgd.weight=3.0", f"distill.teacher={ZOO}", "distill.method=fgd"]
    cfg = load("retinanet_plain.py", *keys, "distill.weights=my weights.pth")
    assert [*cfg.model.stages][1:] == ["fgd"] and cfg.model.stages.fgd.weight == 3.0
    assert cfg.model.teacher.weights == "my weights.pth"


@pytest.mark.parametrize("config", ["custom_coco.py", "custom_coco_plain.py"])
def test_what_the_command_says_about_the_start_holds_beside_inherit(config):
    keys = [f"distill.teacher={ZOO}", "distill.method=inherit"]
    for parts, found in ((["train.inherit=[]"], []), (["train.inherit=[neck]"], ["neck"])):
        assert load(config, *keys, *parts).train.inherit == found  # an empty one is refused later
    assert load(config, *keys).train.inherit == ["neck", "head"]


def test_what_a_method_says_about_the_start_holds():
    keys = [f"distill.teacher={ZOO}", "distill.method=dkd:train.inherit=[neck]"]
    assert load("custom_coco_plain.py", *keys).train.inherit == ["neck"]
    assert load("custom_coco_plain.py", *keys, "train.inherit=[]").train.inherit == []


def test_a_pair_gets_another_teacher_and_its_stages_stay():
    before = load("retinanet_sharedkd.py")
    cfg = load("retinanet_sharedkd.py", f"distill.teacher={ZOO}", "distill.weights=x.pth")
    assert cfg.model.teacher.weights == "x.pth" and cfg.model.stages == before.model.stages


def test_a_key_that_the_plain_student_would_not_have_is_refused():
    key = "backbone.bottom_up.stages.depth=50"
    plain = load("custom_coco.py", "distill.method=none", f"model.student.{key}").model
    assert plain.backbone.bottom_up.stages.depth == 50
    with pytest.raises(ConfigError, match="model.backbone=.*use model.student.backbone"):
        load("custom_coco.py", "distill.method=none", f"model.{key}")


@pytest.mark.parametrize(
    "config, depth",
    [
        ("COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml", 18),
        ("COCO-Detection/retinanet_R_50_FPN_1x.py", 18),
        ("custom_coco.py", 18),
        ("teachers/cascade_mask_rcnn_x101.py", 50),
    ],
)
def test_another_depth_is_torchvisions_resnet(config, depth, tmp_path):
    """All weights of the backbone are in torchvision's file, and images are normalised as there."""
    path = tmp_path / "resnet.pth"
    torch.save(getattr(torchvision.models, f"resnet{depth}")().state_dict(), path)
    cfg = load(config, f"distill.depth={depth}")
    assert cfg.train.init_checkpoint == f"ResNet{depth}_Weights.IMAGENET1K_V1"
    assert ("student" in cfg.model) == (config == "custom_coco.py")
    model = construct(cfg.model.get("student", cfg.model), "model")
    names = {x for x in model.state_dict() if ".bottom_up." in x and "num_batches" not in x}
    assert {*initialise(model, str(path)).names} == names
    channels = [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]
    if cfg.dataloader.train.mapper.image_format == "RGB":
        channels = [x[::-1] for x in channels]
    for found, expected in zip((model.pixel_mean, model.pixel_std), channels):
        assert found.flatten().tolist() == pytest.approx(expected)


def test_a_depth_goes_with_a_teacher_and_other_keys():
    cfg = load(
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "train.init_checkpoint=own.pth",
        "distill.depth=18",
        f"distill.teacher={ZOO}",
    )
    assert cfg.train.inherit == ["neck", "head"] and cfg.train.init_checkpoint == "own.pth"
    assert (
        construct(cfg.model.student, "model").backbone.bottom_up.output_shape()["res5"].channels
        == 512
    )


@pytest.mark.parametrize(
    "config, depth, words",
    [
        ("retinanet_plain.py", "20", "--depth=20: is no depth .*use one of 18, 34"),
        ("custom_coco_mobile.py", "18", "is TorchvisionBackbone, no ResNet"),
        ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", "18", "is build_resnet_backbone, no ResNet"),
    ],
)
def test_a_depth_that_a_detector_cannot_have(config, depth, words):
    with pytest.raises(ConfigError, match=words):
        load(config, f"distill.depth={depth}")


def test_a_depth_sets_the_channel_order_of_a_pair_and_its_loader(tmp_path):
    """FCOS takes its channel order from the pair; a mapper that has none cannot be told."""
    pair = tmp_path / "pair.py"
    pair.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from detectron2.model_zoo import get_config\n"
        "from sharedkd import SharedKD\n"
        "cfg = get_config('COCO-Detection/fcos_R_50_FPN_1x.py')\n"
        "globals().update({k: cfg[k] for k in cfg})\n"
        "model = L(SharedKD)(student=model, stages=None, input_format='BGR')\n"
    )
    cfg = load_config(str(pair), ["distill.depth=18"])
    assert cfg.model.input_format == cfg.dataloader.train.mapper.image_format == "RGB"
    pair.write_text(pair.read_text() + "del dataloader.train.mapper.image_format\n")
    with pytest.raises(ConfigError, match="image_format.*is not there"):
        load_config(str(pair), ["distill.depth=18"])


def test_a_depth_without_batch_norms_gets_them():
    cfg = load("Misc/mask_rcnn_R_50_FPN_3x_gn.yaml", "distill.depth=18")
    assert cfg.MODEL.RESNETS.NORM == "FrozenBN" and cfg.MODEL.FPN.NORM == "GN"


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ConfigError, match="--teacher-weights"):
        load("retinanet_plain.py", "distill.weights=x.pth")
    with pytest.raises(ConfigError, match="--teacher-weights"):
        load("retinanet_plain.py", "distill.weights=")
    with pytest.raises(
        ConfigError, match="distill.teacher, distill.weights, distill.method, distill.depth"
    ):
        Pairing.of(["distill.techer=x"])


def test_a_plain_detector_starts_from_the_teacher_that_it_is_given():
    given = f"distill.teacher={ZOO}"
    assert load("COCO-Detection/retinanet_R_50_FPN_1x.yaml", given).train.inherit == [
        "neck",
        "head",
    ]
    assert load("retinanet_plain.py", given).train.inherit == ["neck", "head"]
    assert (
        load("retinanet_plain.py", "train.inherit=[]", given, "distill.method=pkd").train.inherit
        == []
    )
    assert load("retinanet_sharedkd.py", given).train.inherit == []  # as the pair's config says
