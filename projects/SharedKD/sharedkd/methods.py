"""Distillation methods by name: the recipes of configs/common/methods, and configs that use them.

A recipe is a LazyConfig file with ``paper``, a string, and ``stages``: student's family -> what
``model.stages`` becomes, with the published settings of that family.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Dict, List, Sequence

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from sharedkd.config import override
from sharedkd.errors import ConfigError
from sharedkd.modeling import detectors
from sharedkd.modeling.detectors import count_parameters
from sharedkd.modeling.stages import stage_dict

__all__ = ["FAMILIES", "PLAIN", "OWN", "Method", "family", "known_methods", "with_method"]

PLAIN = "none"  #: the student without distillation
OWN = "config"  #: the stages that the config itself has

_ONE_STAGE = dict(retinanet=RetinaNet, fcos=FCOS)
FAMILIES = ("faster_rcnn", "mask_rcnn", *_ONE_STAGE)

_RESNET = {4: 256, 8: 512, 16: 1024, 32: 2048}


def _shapes(
    strides: Sequence[int], logits: int, deltas: int, stages: Dict[int, int]
) -> Dict[str, Dict[int, int]]:
    heads = {"logits": logits, "deltas": deltas, "boxes": deltas, "anchors": deltas}
    shapes = {tap: dict.fromkeys(strides, channels) for tap, channels in heads.items()}
    return {**shapes, "fpn": dict.fromkeys(strides, 256), "backbone": stages}


# Of the published pairs: ResNet with bottlenecks, FPN of 256 channels, COCO's 80 classes.
_RCNN = _shapes((4, 8, 16, 32, 64), 3, 12, _RESNET)
_DENSE = {s: c for s, c in _RESNET.items() if s > 4}
_PUBLISHED_SHAPES = dict(
    faster_rcnn=_RCNN,
    mask_rcnn=_RCNN,
    retinanet=_shapes((8, 16, 32, 64, 128), 9 * 80, 9 * 4, _DENSE),
    fcos=_shapes((8, 16, 32, 64, 128), 80, 4, _DENSE),
)


@dataclass(frozen=True)
class Method:
    """A recipe.

    Args:
        name: the file's, without its ending.
        paper: title, venue and year.
        stages: student's family -> LazyConfig node of the stages.
    """

    name: str
    paper: str
    stages: Dict[str, DictConfig]

    @classmethod
    def load(cls, path: Path) -> "Method":
        """The recipe in the file ``path``.

        Raises:
            ConfigError: no such file, or not a recipe.
        """
        try:
            paper, stages = LazyConfig.load(str(path), ("paper", "stages"))
        except Exception as e:
            raise ConfigError(
                "--methods", path, f"cannot be read as a recipe: {e}", "see configs/common/methods"
            ) from e
        return cls(path.stem, paper, dict(stages))

    def parameters(self, family: str) -> int:
        """How many parameters its losses have for the published pairs of ``family``.

        Args:
            family: one of ``stages``.
        """
        shapes, count = _PUBLISHED_SHAPES[family], 0
        for name, stage in instantiate(self.stages[family]).items():
            stage.loss.bind(shapes, shapes, name)
            count += count_parameters(stage.loss)
        return count


def known_methods(folder: Path) -> List[Method]:
    """All recipes of ``folder``, in the order of their names.

    Raises:
        ConfigError: a ``.py`` file in it that is not a recipe.
    """
    return [Method.load(path) for path in sorted(folder.glob("*.py"))]


def family(student: DictConfig) -> str:
    """Which of :data:`FAMILIES` has the settings for ``student``, a detector's LazyConfig node.

    Raises:
        ConfigError: the detector cannot be built.
    """
    target = student["_target_"]
    target = locate(target) if isinstance(target, str) else target
    if isinstance(target, type):
        if issubclass(target, GeneralizedRCNN):
            return "mask_rcnn" if student.roi_heads.get("mask_head") else "faster_rcnn"
        for name, detector in _ONE_STAGE.items():
            if issubclass(target, detector):
                return name
    try:
        with torch.device("meta"):
            model = instantiate(student)
    except Exception as e:
        raise ConfigError(
            "model",
            target,
            f"is not of a family that the recipes know ({', '.join(FAMILIES)}), and cannot be built: {e}",
            "write the stages into a config of your own and use --methods config",
        ) from e
    return detectors.family(model)


def with_method(cfg: DictConfig, name: str, folder: Path) -> DictConfig:
    """A copy of a pair's config that uses another method.

    Args:
        cfg: of a pair, or of a plain detector.
        name: ``none``, ``config``, a recipe's name or path, or several joined by ``+``;
            ``fgd:4`` multiplies the weights of its stages by 4, and ``fgd:key=value`` sets a key of
            the config.
        folder: the recipes.

    Raises:
        ConfigError: an unknown name, a method that is not defined for this family, one that needs a
            pair where there is none, or a key or value that cannot be set.
    """
    cfg = cfg.copy()
    parts = [part.split(":") for part in name.split("+")]
    names = [[part, *(x for x in more if "=" not in x)] for part, *more in parts]
    _choose(cfg, names, folder)
    for setting in (x for _, *more in parts for x in more if "=" in x):
        override(cfg, setting, "the config")
    return cfg


def _choose(cfg: DictConfig, names: Sequence[Sequence[str]], folder: Path) -> None:
    """Give a config the stages of recipes: each a name, and perhaps a factor of its weights."""
    if names == [[PLAIN]]:
        if OmegaConf.select(cfg, "train.inherit"):  # it starts from the teacher as the others do
            cfg.model.stages = L(stage_dict)()
        else:
            cfg.model = cfg.model.get("student", cfg.model)
        return
    if "student" not in cfg.model:
        raise ConfigError(
            "--config-file", "model", "is a plain detector", "use a pair's config, see configs/"
        )
    if names == [[OWN]]:
        return
    kind, stages = family(cfg.model.student), L(stage_dict)()
    for part, *factors in names:
        recipe = _recipe(part, folder)
        if kind not in recipe.stages:
            raise ConfigError(
                "--methods",
                part,
                f"is defined for {', '.join(recipe.stages)}, and the student is a {kind}",
                "leave it out",
            )
        found = recipe.stages[kind].copy()
        for key, stage in found.items():
            if key != "_target_":
                stage.weight = stage.get("weight", 1.0) * prod(map(_factor, factors))
                while key in stages:
                    key = f"{recipe.name}_{key}"
                stages[key] = stage
    cfg.model.stages = stages


def _factor(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            "--methods",
            f":{text}",
            "is neither a number nor key=value",
            "write fgd:4, or fgd:model.teacher.precision=bfloat16",
        ) from None


def _recipe(name: str, folder: Path) -> Method:
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        names = ", ".join((PLAIN, OWN, *(p.stem for p in sorted(folder.glob("*.py")))))
        raise ConfigError("--methods", name, "no such method", f"use a recipe's path, or {names}")
    return Method.load(path)
