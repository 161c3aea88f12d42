"""A config's detector with a ResNet of another depth."""

from typing import Any

from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet
from omegaconf import DictConfig, ListConfig, OmegaConf

from sharedkd.errors import ConfigError
from sharedkd.weights.conventions import RGB_MEAN, RGB_STD

from .build import target_of
from .classic import is_classic

__all__ = ["DEPTHS", "ONE_OF", "set_depth"]

KEY = "--depth"
DEPTHS = ("18", "34", "50", "101", "152")  #: of torchvision's ResNets
ONE_OF = f"use one of {', '.join(DEPTHS)}"
#: How the images are prepared that torchvision's ResNets were trained on.
MEAN, STD, FORMAT = [*RGB_MEAN], [*RGB_STD], "RGB"


def set_depth(cfg: DictConfig, text: str) -> None:
    """Give a config's detector torchvision's ResNet of a depth, with its ImageNet weights as the start.

    What depends on the depth follows it: widths, the position of strides, normalisation and channel order of
    images, and ``train.init_checkpoint``.  FPN and heads stay as they are.

    Args:
        cfg: of a plain detector or a pair, whose student it is then; changed in place.
        text: one of :data:`DEPTHS`.

    Raises:
        ConfigError: no such depth, or a detector without a ResNet.
    """
    if text not in DEPTHS:
        raise ConfigError(KEY, text, "is no depth of torchvision's ResNets", ONE_OF)
    depth = int(text)
    (_set_classic if is_classic(cfg) else _set_lazy)(cfg, depth)
    OmegaConf.update(cfg, "train.init_checkpoint", f"ResNet{depth}_Weights.IMAGENET1K_V1")


def _set_classic(cfg: DictConfig, depth: int) -> None:
    name = cfg.MODEL.BACKBONE.NAME
    if "resnet_fpn" not in name:
        raise _without(depth, name)
    cfg.MODEL.RESNETS.update(
        DEPTH=depth,
        RES2_OUT_CHANNELS=_res2(depth),
        STRIDE_IN_1X1=False,
        NUM_GROUPS=1,
        WIDTH_PER_GROUP=64,
        DEFORM_ON_PER_STAGE=[False] * 4,
        RES5_DILATION=1,
        NORM=_with_statistics(cfg.MODEL.RESNETS.NORM),
    )
    cfg.MODEL.update(PIXEL_MEAN=MEAN, PIXEL_STD=STD)
    cfg.INPUT.FORMAT = FORMAT


def _set_lazy(cfg: DictConfig, depth: int) -> None:
    model = cfg.model.get("student", cfg.model)
    bottom_up = OmegaConf.select(model, "backbone.bottom_up")
    kind = target_of(bottom_up)
    if kind is not ResNet:
        raise _without(depth, getattr(kind, "__name__", "without a part bottom_up"))
    stages = bottom_up.stages[0] if isinstance(bottom_up.stages, ListConfig) else bottom_up.stages
    norm = _with_statistics(stages.get("norm", "FrozenBN"))
    bottom_up.stages = L(ResNet.make_default_stages)(depth=depth, norm=norm)
    top = OmegaConf.select(model, "backbone.top_block")
    if (
        isinstance(top, DictConfig)
        and top.get("in_feature", "res5") == "res5"
        and "in_channels" in top
    ):
        top.in_channels = 8 * _res2(depth)  # res5
    for key, value in (("pixel_mean", MEAN), ("pixel_std", STD), ("input_format", FORMAT)):
        if key in model:
            model[key] = value
    if "student" in cfg.model and "input_format" in cfg.model:
        cfg.model.input_format = FORMAT
    for split in ("train", "test"):
        key = f"dataloader.{split}.mapper.image_format"
        if OmegaConf.select(cfg, key) is None:
            problem = "is not there, and the weights of this depth want RGB images"
            raise ConfigError(
                key, None, problem, "use Detectron2's mapper, or set the depth's keys"
            )
        OmegaConf.update(cfg, key, FORMAT)


def _res2(depth: int) -> int:
    """The channels of res2: basic blocks have a quarter of a bottleneck's."""
    return 64 if depth < 50 else 256


def _with_statistics(norm: Any) -> str:
    """``norm``, or FrozenBN if it is no batch norm: torchvision's weights have those of batch norms."""
    return norm if isinstance(norm, str) and "BN" in norm else "FrozenBN"


def _without(depth: int, found: str) -> ConfigError:
    fix = "name the config of a smaller detector by --config-file"
    return ConfigError(KEY, depth, f"the backbone is {found}, no ResNet with an FPN", fix)
