"""Shared-KD as stages of a config: with this project's defaults, and as published."""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from sharedkd.losses import CrossLayer, IdenticalLayer
from sharedkd.modeling.stages import Stage, stage_dict

__all__ = ["ONE_STAGE_WEIGHT", "published_stages", "shared_kd_stages"]

#: The weight of the identical-layer part for one-stage students; docs/results.md has the measurement.
ONE_STAGE_WEIGHT = 10.0


def published_stages(weight: float = 2.0) -> DictConfig:
    """Shared-KD as published: raw mean squared errors of all levels, weight 2, from start to end.

    Each of the two parts has this ``weight``.  Cross-layer distillation takes the backbone's
    stages, whose widths differ (our reading).
    """
    return L(stage_dict)(
        identical=L(Stage)(loss=L(IdenticalLayer)(ignore_padding=False), weight=weight),
        cross=L(Stage)(loss=L(CrossLayer)(tap="backbone", ignore_padding=False), weight=weight),
    )


def shared_kd_stages(weight: float = 2.0) -> DictConfig:
    """Shared-KD with this project's defaults; docs/results.md has the measurements behind them.

    Args:
        weight: of the identical-layer part; the cross-layer part weighs a twentieth of it.  The
            configs of one-stage detectors use :data:`ONE_STAGE_WEIGHT`.
    """
    return L(stage_dict)(
        identical=L(Stage)(
            loss=L(IdenticalLayer)(
                tap="fpn", strides=None, share="dense", distance="mse", normalize="instance"
            ),
            weight=weight,
            start=0,
            ramp=0,
            end=None,
            relative=False,
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
            weight=weight / 20,
            start=0,
            ramp=0,
            end=None,
            relative=False,
        ),
    )
