"""Distillation methods by name: the recipes of configs/common/methods.

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
from omegaconf import DictConfig

from sharedkd.errors import ConfigError

from .detectors import count_parameters
from .stages import Stage, stage_dict

__all__ = ["FAMILIES", "FOLDER", "START", "Method", "known_methods", "stages_of"]

FOLDER = Path(__file__).parents[4] / "configs/common/methods"  #: the recipes, in the repository

START = "inherit"  #: the student that starts from its teacher, and learns without it
FAMILIES = ("faster_rcnn", "mask_rcnn", "retinanet", "fcos")  #: what recipes have settings for

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
        with torch.device("meta"):  # only counted
            for name, stage in instantiate(self.stages[family]).items():
                stage.loss.bind(shapes, shapes, name)
                count += count_parameters(stage.loss)
        return count


def known_methods() -> List[Method]:
    """All recipes, in the order of their names."""
    return [Method.load(path) for path in sorted(FOLDER.glob("*.py"))]


def stages_of(name: str, kind: str) -> DictConfig:
    """The config node of a method's stages.

    Args:
        name: ``inherit``, which has no stages; or a recipe's name or path, or several joined by ``+``;
            ``fgd:4`` multiplies the weights of its stages by 4, ``fgd:auto`` sets them by themselves (see
            :class:`~sharedkd.modeling.balance.AutoWeight`), ``fgd:auto:0.1`` with the share 0.1.
        kind: the student's family, see :func:`~sharedkd.modeling.detectors.family`.

    Raises:
        ConfigError: an unknown name, a factor that is no number, or a recipe that is not defined for
            ``kind``.
    """
    stages = L(stage_dict)()
    if name == START:
        return stages
    for part, *factors in (part.split(":") for part in name.split("+")):
        recipe = _recipe(part)
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
                _weigh(stage, factors)
                while key in stages:
                    key = f"{recipe.name}_{key}"
                stages[key] = stage
    return stages


def _weigh(stage: DictConfig, factors: Sequence[str]) -> None:
    """Apply what follows a recipe's name: ``4`` multiplies weights, ``auto`` and ``auto:0.1`` set shares.

    A stage that is off stays off.
    """
    numbers = [_factor(x) for x in factors if x != "auto"]
    if "auto" in factors and stage.get("weight", 1.0):
        stage.weight = "auto"
        if numbers:
            stage.share = prod(numbers)
    else:
        multiply(stage, prod(numbers))


def multiply(stage: DictConfig, factor: float) -> None:
    """Multiply the weight of a stage's config node by ``factor``; of one that sets itself, its share."""
    weight = stage.get("weight", 1.0)
    if weight == "auto":
        stage.share = stage.get("share", Stage.share) * factor
    else:
        stage.weight = weight * factor


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


def _recipe(name: str) -> Method:
    path = Path(name) if name.endswith(".py") else FOLDER / f"{name}.py"
    if not path.is_file():
        names = ", ".join(("none", START, "config", *(p.stem for p in sorted(FOLDER.glob("*.py")))))
        raise ConfigError("--methods", name, "no such method", f"use a recipe's path, or {names}")
    return Method.load(path)
