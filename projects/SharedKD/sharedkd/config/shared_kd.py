"""Shared-KD as stages of a config: with this project's defaults, and as published."""

from typing import Optional, Union

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from sharedkd.losses import CrossLayer, IdenticalLayer
from sharedkd.modeling.stages import Stage, stage_dict

__all__ = ["published_stages", "shared_kd_stages"]


def published_stages(weight: float = 2.0) -> DictConfig:
    """Shared-KD as published: raw mean squared errors of all levels, weight 2, from start to end.

    Each of the two losses has this ``weight``.  Cross-layer distillation takes the backbone's
    stages, whose widths differ (our reading).
    """
    return L(stage_dict)(
        identical=L(Stage)(loss=L(IdenticalLayer)(ignore_padding=False), weight=weight),
        cross=L(Stage)(loss=L(CrossLayer)(tap="backbone", ignore_padding=False), weight=weight),
    )


def shared_kd_stages(
    weight: Union[float, str] = "auto", share: float = 1.0, balance: Optional[str] = "levels"
) -> DictConfig:
    """Shared-KD with this project's defaults; docs/results.md has the measurements behind them.

    The cross-layer loss is in the config, and off: no measurement has shown that it helps.
    ``model.stages.cross.weight=auto`` switches it on.

    Args:
        weight: of the identical-layer loss.
        share: what its gradient is of the detector's own, with the weight ``auto``.
        balance: ``levels``: an equal share for each.  A level that is constant at the start, as one that the
            teacher lacks, has a gradient without bound once it is standardised, and would set the weight
            of all.
    """
    return L(stage_dict)(
        identical=L(Stage)(
            loss=L(IdenticalLayer)(
                tap="fpn", strides=None, share="dense", distance="mse", normalize="instance"
            ),
            weight=weight,
            share=share,
            balance=balance,
            start=0,
            ramp=0,
            decay=0,
            end=None,
        ),
        cross=L(Stage)(
            loss=L(CrossLayer)(
                tap="backbone",
                strides=None,
                pairs="dense",
                direction="deep_to_shallow",
                distance="mse",
                normalize="instance",
            ),
            weight=0.0,
            share=0.03,
            start=0,
            ramp=0,
            decay=0,
            end=None,
        ),
    )
