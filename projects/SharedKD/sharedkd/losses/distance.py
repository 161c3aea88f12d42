"""How far apart two aligned maps are: four distances, each raw or scale-free."""

from dataclasses import dataclass
from typing import Callable, Dict, Optional

import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .base import precise

__all__ = ["Distance", "DISTANCES", "NORMALIZATIONS"]

EPS = 1e-6  # added to a variance: a constant map has a gradient of zero, not NaN


def _mean(x: Tensor, mask: Optional[Tensor], dims) -> Tensor:
    """Mean of x over dims, counting only where mask (N, 1, H, W) is one."""
    if mask is None:
        return x.mean(dims, keepdim=True)
    count = mask.expand_as(x[:, :1]).sum(dims, keepdim=True) * (x.shape[1] if 1 in dims else 1)
    return (x * mask).sum(dims, keepdim=True) / count.clamp(min=1)


def _standardise(x: Tensor, mask: Optional[Tensor], dims) -> Tensor:
    centred = x - _mean(x, mask, dims)
    return centred / (_mean(centred.square(), mask, dims) + EPS).sqrt()


NORMALIZATIONS: Dict[str, Callable[[Tensor, Optional[Tensor]], Tensor]] = {
    # as published: the numbers as they are
    "none": lambda x, mask: x,
    # zero mean, unit variance per channel over the batch (as PKD does, NeurIPS 2022): MSE becomes
    # 2 (1 - Pearson correlation)
    "channel": lambda x, mask: _standardise(x, mask, (0, 2, 3)),
    # the same per image, so that an image's loss does not depend on its batch
    "instance": lambda x, mask: _standardise(x, mask, (2, 3)),
    # zero mean, unit variance over the channels of each position
    "position": lambda x, mask: _standardise(x, None, (1,)),
}

DISTANCES: Dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda x, y: (x - y).square(),
    "l1": lambda x, y: (x - y).abs(),
    "smooth_l1": lambda x, y: F.smooth_l1_loss(x, y, reduction="none"),
    "cosine": lambda x, y: 1 - F.cosine_similarity(x, y, dim=1, eps=EPS).unsqueeze(1),
}


@dataclass(frozen=True)
class Distance:
    """Mean distance between two maps of one shape, computed in float32 at least.

    Args:
        kind: ``mse``, ``l1``, ``smooth_l1`` (element by element) or ``cosine`` (one minus the cosine
            of the two channel vectors of a position).
        normalize: ``none`` (raw), or scale-free: ``channel``, ``instance``, ``position``.

    Raises:
        ConfigError: unknown name.
    """

    kind: str = "mse"
    normalize: str = "none"

    def __post_init__(self):
        for key, value, known in (
            ("distance", self.kind, DISTANCES),
            ("normalize", self.normalize, NORMALIZATIONS),
        ):
            if value not in known:
                raise ConfigError(key, value, "no such name", f"use one of {', '.join(known)}")

    def __call__(self, x: Tensor, y: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            x, y: (N, C, H, W) of any floating type.
            mask: (N, 1, H, W), one where a position counts; None counts all.

        Returns:
            scalar tensor.
        """
        x, y = precise(x), precise(y)
        mask = None if mask is None else mask.to(x.dtype)
        normalize = NORMALIZATIONS[self.normalize]
        each = DISTANCES[self.kind](normalize(x, mask), normalize(y, mask))
        return _mean(each, mask, (0, 1, 2, 3)).view(())
