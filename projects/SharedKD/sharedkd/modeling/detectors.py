"""Builds a teacher's network from a name in the model zoo, a path, a config or a model."""

import os
import re
from typing import Optional, Tuple, Union

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from omegaconf import DictConfig, OmegaConf
from torch import nn

from sharedkd.errors import ConfigError

__all__ = [
    "KEY",
    "build_detector",
    "config_path",
    "count_parameters",
    "family",
    "num_classes",
    "load_file",
    "read_config",
    "weights_of",
]

KEY = "model.teacher"


def read_config(name: str) -> Union[CfgNode, DictConfig]:
    """Read a detector's config.

    Args:
        name: in the model zoo, or a path: a LazyConfig as Python or YAML, a classic config, or the folder
            of a run.

    Raises:
        ConfigError: there is no such config, or it cannot be read.
    """
    path = config_path(name)
    if path is None:
        raise ConfigError(
            f"{KEY}.config",
            name,
            "is neither a file, the folder of a run, nor a name in Detectron2's model zoo",
            "train that teacher first if it is your own; or use the path of another config, or a "
            "name such as COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
        )
    return load_file(path, f"{KEY}.config")


def config_path(name: str) -> Optional[str]:
    """Where the config ``name``, a file, the folder of a run or a name in the model zoo, is; None: nowhere."""
    path = os.path.join(name, "config.yaml") if os.path.isdir(name) else name
    if os.path.isfile(path):
        return path
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        return None


def load_file(path: str, key: str) -> Union[CfgNode, DictConfig]:
    """Read the config ``path``: a LazyConfig as Python or YAML, or a classic config.

    Raises:
        ConfigError: it cannot be read; ``key`` names it.
    """
    try:
        if path.endswith(".py") or _is_lazy_yaml(path):
            return LazyConfig.load(path)
        config = get_cfg()
        config.MODEL.SHAREDKD = CfgNode(new_allowed=True)  # of a pair
        config.merge_from_file(path)
        if not config.MODEL.SHAREDKD:
            del config.MODEL["SHAREDKD"]
        return config
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError(key, path, f"cannot be read: {e}", "correct that file") from e


def _is_lazy_yaml(path: str) -> bool:
    """A LazyConfig saved as yaml has a `model` node; Detectron2's classic configs have `MODEL`."""
    with open(path) as f:
        return any(re.match(r"[{\s]*model:", line) for line in f)


def weights_of(name: str) -> Optional[str]:
    """Where the weights of the config ``name`` are; None: nowhere.

    Args:
        name: in the model zoo; or the folder of a run, whose last checkpoint is meant.
    """
    last = os.path.join(name, "last_checkpoint")
    if os.path.isfile(last):
        with open(last) as f:
            return os.path.join(name, f.read().strip())
    try:
        return model_zoo.get_checkpoint_url(name)
    except RuntimeError:
        return None


def build_detector(
    config: Union[CfgNode, DictConfig, nn.Module],
) -> Tuple[nn.Module, Optional[str]]:
    """Build a detector.

    Args:
        config: a detector's config or LazyConfig node, or a model; of a pair, the student is taken.

    Returns:
        the model, on PyTorch's default device and without weights, and the channel order that its config names or None.

    Raises:
        ConfigError: the detector cannot be built.
    """
    if isinstance(config, nn.Module):
        return getattr(config, "student", config), None
    if isinstance(config, CfgNode):
        config = config.clone()
        config.defrost()
        config.MODEL.DEVICE = str(torch.empty(0).device)
        config.MODEL.WEIGHTS = ""
        if config.MODEL.META_ARCHITECTURE == "SharedKD":
            keys = config.MODEL.get("SHAREDKD", {})
            config.MODEL.META_ARCHITECTURE = keys.get("STUDENT", "GeneralizedRCNN")
        return build_model(config), config.INPUT.FORMAT
    node = config.model if "model" in config else config
    if "student" in node:
        node = node.student
    try:
        model = instantiate(node)
    except Exception as e:
        raise ConfigError(
            f"{KEY}.config",
            str(node.get("_target_")),
            f"cannot be built: {e}",
            "correct that config",
        ) from e
    return model, OmegaConf.select(config, "dataloader.train.mapper.image_format", default=None)


def count_parameters(module: nn.Module) -> int:
    """How many numbers the parameters of ``module`` hold, trained or not."""
    return sum(p.numel() for p in module.parameters())


def num_classes(detector: nn.Module) -> Optional[int]:
    """How many classes ``detector``, one of Detectron2's, tells apart; None if it does not say."""
    for module in (detector, getattr(detector, "roi_heads", None)):
        if hasattr(module, "num_classes"):
            return module.num_classes
    return None


def family(detector: nn.Module) -> str:
    """The family whose published settings suit ``detector``, a built model.

    Returns:
        ``fcos``, ``retinanet``, ``mask_rcnn`` or ``faster_rcnn``.  A model of none of them has the
        settings of RetinaNet if its pyramid begins at stride 8 or above, else those of Faster R-CNN.
    """
    for name, kind in (("fcos", FCOS), ("retinanet", RetinaNet)):
        if isinstance(detector, kind):
            return name
    heads = getattr(detector, "roi_heads", None)
    if heads is not None or hasattr(detector, "proposal_generator"):
        return "mask_rcnn" if getattr(heads, "mask_on", False) else "faster_rcnn"
    output_shape = getattr(getattr(detector, "backbone", None), "output_shape", dict)
    finest = min((x.stride or 4 for x in output_shape().values()), default=4)
    return "retinanet" if finest >= 8 else "faster_rcnn"
