"""Configs that use another distillation method, by its name."""

from typing import Optional

from detectron2.config import LazyCall as L
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from sharedkd.errors import ConfigError
from sharedkd.modeling.recipes import family, stages_of
from sharedkd.modeling.stages import stage_dict

from .classic import build_detector
from .overrides import override

__all__ = ["OWN", "PLAIN", "family_of", "with_method"]

PLAIN = "none"  #: the student without distillation
OWN = "config"  #: the stages that the config itself has


def family_of(student: DictConfig) -> Optional[str]:
    """The family of ``student``, a detector's LazyConfig node, as the recipes name it; None: another."""
    target = student["_target_"]
    target = locate(target) if isinstance(target, str) else target
    masks = bool(OmegaConf.select(student, "roi_heads.mask_head"))
    if target is build_detector:
        target = META_ARCH_REGISTRY.get(student.yaml.MODEL.META_ARCHITECTURE)
        masks = student.yaml.MODEL.MASK_ON
    return family(target, masks) if isinstance(target, type) else None


def with_method(cfg: DictConfig, name: str) -> DictConfig:
    """A copy of a pair's config that uses another method.

    Args:
        cfg: of a pair, or of a plain detector.
        name: ``none``, ``config``, or as :func:`~sharedkd.modeling.recipes.stages_of` takes it;
            ``fgd:key=value`` sets a key of the config, too.

    Raises:
        ConfigError: a method that needs a pair where there is none, a key or value that cannot be set,
            or see :func:`~sharedkd.modeling.recipes.stages_of`.
    """
    cfg = cfg.copy()
    parts = [part.split(":") for part in name.split("+")]
    names = "+".join(":".join(x for x in part if "=" not in x) for part in parts)
    if names == PLAIN:
        if OmegaConf.select(cfg, "train.inherit"):  # it starts from the teacher as the others do
            cfg.model.stages = L(stage_dict)()
        else:
            cfg.model = cfg.model.get("student", cfg.model)
    elif "student" not in cfg.model:
        fix = "add --teacher, or use a pair's config, see configs/"
        raise ConfigError("--config-file", "model", "is a plain detector", fix)
    elif names != OWN:
        cfg.model.stages = stages_of(names, family_of(cfg.model.student))
    for setting in (x for part in parts for x in part[1:] if "=" in x):
        override(cfg, setting, "the config")
    return cfg
