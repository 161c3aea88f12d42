"""Configs that use another distillation method, by its name."""

import inspect
import logging
import re
from typing import Sequence

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from omegaconf import DictConfig, OmegaConf

from sharedkd.errors import ConfigError
from sharedkd.modeling.detectors import family
from sharedkd.modeling.recipes import START, stages_of
from sharedkd.modeling.stages import stage_dict
from sharedkd.weights.loading import PARTS

from .build import target_of
from .classic import build_detector, expanded
from .overrides import override

__all__ = ["DEFAULT", "OWN", "PLAIN", "START", "check_shares", "family_of", "with_method"]

logger = logging.getLogger("detectron2.sharedkd")

PLAIN = "none"  #: the student without a teacher
OWN = "config"  #: the stages that the config itself has
DEFAULT = "shared_kd"  #: of a plain detector that gets a teacher

_OF_AUTO = re.compile(r"\+*(?P<stage>model(?:\.peers\.\w+)?\.stages\.\w+)\.(share|every|balance)=")
_KNOWN = {GeneralizedRCNN: "faster_rcnn", RetinaNet: "retinanet", FCOS: "fcos"}


def family_of(student: DictConfig) -> str:
    """Which of :data:`~sharedkd.modeling.recipes.FAMILIES` has the settings for a detector's node.

    A node of Detectron2's own classes is not built: its data may not be known yet.

    Raises:
        ConfigError: the detector cannot be built.
    """
    target = target_of(student)
    masks = bool(OmegaConf.select(student, "roi_heads.mask_head"))
    if target is build_detector:
        target = META_ARCH_REGISTRY.get(student.yaml.MODEL.META_ARCHITECTURE)
        masks = student.yaml.MODEL.MASK_ON
    for detector, kind in _KNOWN.items():
        if isinstance(target, type) and issubclass(target, detector):
            return "mask_rcnn" if masks and kind == "faster_rcnn" else kind
    try:
        with torch.device("meta"):
            model = instantiate(student)
    except Exception as e:
        fix = "correct it, or write the stages into a config of your own and use --methods config"
        raise ConfigError("model", student["_target_"], f"cannot be built: {e}", fix) from e
    return family(model)


def _student_of(model: DictConfig) -> DictConfig:
    """The plain detector of a pair's node, or the node of a plain detector itself."""
    if "student" not in model:
        return model
    known = inspect.signature(target_of(model)).parameters
    if "student" not in known:  # an override of a plain detector, which refuses it
        return model
    for name in sorted(model.keys() - {"_target_", *known}):
        problem, fix = "is no key of the pair", f"use model.student.{name}"
        raise ConfigError(f"model.{name}", "", problem, fix)
    return model.student


def with_method(cfg: DictConfig, name: str) -> DictConfig:
    """A copy of a pair's config that uses another method.

    Args:
        cfg: of a pair, or of a plain detector.
        name: ``none`` or ``inherit``, which leave out images without labels, too; ``config``; or as
            :func:`~sharedkd.modeling.recipes.stages_of` takes it; ``fgd:key=value`` sets a key of the
            config, too.

    Raises:
        ConfigError: a method that needs a pair where there is none, a key or value that cannot be set,
            epochs, or see :func:`~sharedkd.modeling.recipes.stages_of`.
    """
    cfg = cfg.copy()
    words = [part.split(":") for part in name.split("+")]
    names = "+".join(":".join(x for x in part if "=" not in x) for part in words)
    settings = [x for part in words for x in part[1:] if "=" in x]
    if any(x.startswith("train.epochs=") for x in settings):  # they were counted for all
        fix = "set train.epochs for all, or train.max_iter here"
        raise ConfigError("--methods", name, "has epochs of its own", fix)
    if names in (PLAIN, START) and OmegaConf.select(cfg, "data.unlabelled_images"):
        logger.info(f"{names} leaves out data.unlabelled_images: nothing learns from them")
        cfg.data.update(unlabelled_images=None, unlabelled_json=None)
    if names == PLAIN:
        cfg.model = _student_of(cfg.model)
        OmegaConf.update(cfg, "train.inherit", [], force_add=True)
    elif "student" not in cfg.model:
        fix = "add --teacher, or use a pair's config, see configs/"
        raise ConfigError("--config-file", "model", "is a plain detector", fix)
    elif names == START:
        cfg.model.stages = L(stage_dict)()
        parts = OmegaConf.select(cfg, "train.inherit") or [*PARTS]
        OmegaConf.update(cfg, "train.inherit", parts, force_add=True)
    elif names != OWN:
        cfg.model.stages = stages_of(names, family_of(cfg.model.student))
    if names != OWN and cfg.model.pop("peers", None):  # they are a part of the config's own method
        logger.warning(f"{names} leaves out the config's model.peers")
    settings = [x for setting in settings for x in expanded(cfg, setting)]
    for setting in settings:
        override(cfg, setting, "the config")
    check_shares(cfg, settings)
    return cfg


def check_shares(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse an override of what only a weight that sets itself has, of a stage with a fixed one.

    Raises:
        ConfigError: there is one.
    """
    for text in overrides:
        found = _OF_AUTO.match(text)
        stage = OmegaConf.select(cfg, found["stage"]) if found else None
        if not isinstance(stage, DictConfig) or "loss" not in stage:
            continue
        weight = None if OmegaConf.is_missing(stage, "weight") else stage.get("weight", 1.0)
        key, _, value = text.lstrip("+").partition("=")
        if weight not in ("auto", 0, None) and value not in ("null", "None"):
            problem, fix = f"has no effect beside weight={weight}", "add {}.weight=auto"
            raise ConfigError(key, value, problem, fix.format(found["stage"]))
