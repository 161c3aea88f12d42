"""How alike two feature maps are: the losses' own distances, and linear CKA over minibatches.

Linear CKA (Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019) is
computed as in Nguyen, Raghu and Kornblith, "Do Wide and Deep Networks Learn the Same Things?", ICLR
2021, section 2: with the Gram matrices ``K = X X^T`` and ``L = Y Y^T`` of the n examples of a
minibatch, and ``K~``, ``L~`` the same with a diagonal of zeros::

    HSIC(K, L) = 1 / (n (n - 3)) * ( tr(K~ L~)
                 + (1^T K~ 1) (1^T L~ 1) / ((n - 1) (n - 2)) - 2 / (n - 2) * 1^T K~ L~ 1 )

    CKA = mean_b HSIC(K_b, L_b) / sqrt( mean_b HSIC(K_b, K_b) * mean_b HSIC(L_b, L_b) )

over minibatches b.  This HSIC is the unbiased estimator of Song et al., "Feature Selection via
Dependence Maximization", JMLR 2012, so the expected mean does not depend on the minibatch's size.  It equals
``<A, B> / (n (n - 3))`` for the U-centred matrices A of K and B of L (Székely and Rizzo, Annals of
Statistics 2014), which is how it is computed here: one matrix per map serves all pairs.
"""

from typing import Optional, Sequence, TypeVar

import numpy as np
import torch
from torch import Tensor

from sharedkd.losses.alignment import Pooled, align
from sharedkd.losses.distance import Distance

__all__ = ["MEASURES", "SMALLEST_MINIBATCH", "aligned", "cka", "gap", "hsic", "u_centred"]

#: What is measured: the loss's mean squared error, and two similarities, 1 for equal maps.
MEASURES = ("mse", "cosine", "cka")
SMALLEST_MINIBATCH = 4  # examples; with fewer the estimator is not defined

_Values = TypeVar("_Values", float, np.ndarray)


def gap(measure: str, value: _Values) -> _Values:
    """The ``value`` of ``measure``, one of :data:`MEASURES`, as a gap, 0 for equal maps.

    Of the MSE it is the value itself, of a similarity one minus it.
    """
    return value if measure == "mse" else 1 - value


def aligned(
    x: Pooled, y: Pooled, normalize: str, mask: Optional[Tensor] = None
) -> "dict[str, float]":
    """MSE and cosine of two maps (1, C, H, W) after the losses' alignment.

    Args:
        normalize: of the MSE, see :class:`~sharedkd.losses.distance.Distance`.
        mask: (1, 1, h, w) of the smaller size, true where a position counts.

    Returns:
        "mse", and "cosine": the mean over positions of the cosine of the two channel vectors.
    """
    x, y = align(x, y)
    return {
        "mse": Distance("mse", normalize)(x, y, mask).item(),
        "cosine": 1 - Distance("cosine", "none")(x, y, mask).item(),
    }


def u_centred(rows: Tensor) -> np.ndarray:
    """The U-centred Gram matrix (n, n) of the examples ``rows`` (n, C); all NaN if n is below 4."""
    n = len(rows)
    if n < SMALLEST_MINIBATCH:
        return np.full((n, n), np.nan)
    rows = rows.to(torch.float64)
    rows = rows - rows.mean(0)  # changes nothing but rounding
    gram = (rows @ rows.T).fill_diagonal_(0)
    sums = gram.sum(0)
    gram = gram - (sums[:, None] + sums) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0).numpy()


def hsic(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimate of HSIC from two results of :func:`u_centred`; NaN below n = 4."""
    n = len(a)
    return float((a * b).sum() / (n * (n - 3))) if n >= SMALLEST_MINIBATCH else np.nan


def cka(xy: Sequence[float], xx: Sequence[float], yy: Sequence[float]) -> float:
    """CKA from the :func:`hsic` of two maps, and of each with itself, one per minibatch.

    NaN where a map does not vary.
    """
    product = np.mean(xx) * np.mean(yy)
    return float(np.mean(xy) / np.sqrt(product)) if np.mean(xx) > 0 < product else np.nan
