"""FKD: attention-guided features and outputs of non-local blocks, compared by unsquared norms."""

from typing import Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharedkd.errors import ConfigError
from sharedkd.values import check_number

from .adapter import adapters
from .base import Batch, DistillationLoss, Shapes, check_weights

__all__ = ["FKD", "NonLocal"]


class NonLocal(nn.Module):
    """Dot-product non-local block (Wang et al., CVPR 2018) with pooled keys and values::

        NL(x) = x + BN( W ( theta(x) . pool(phi(x))^T / K . pool(g(x)) ) )

    over the K positions that max-pooling leaves.  The norm's scale and shift start at zero: the
    block starts as the identity.  (N, C, H, W) -> (N, C, H, W); 4 C c + 3 c + 3 C parameters with
    c = max(C // reduction, 1).

    Args:
        channels: C.
        reduction: C / c.
        pool: size and stride of the max-pooling, at most the size of the map; rows and columns
            that are left over at the bottom and the right are dropped.
    """

    def __init__(self, channels: int, reduction: int, pool: int):
        super().__init__()
        inner = max(channels // reduction, 1)
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(channels, inner, 1)
        self.g = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1)
        # Losses are computed in training only: running statistics would never be read.
        self.norm = nn.BatchNorm2d(channels, track_running_stats=False)
        nn.init.zeros_(self.norm.weight)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """NL(``x``), of the same shape."""
        size = [min(self.pool, n) for n in x.shape[-2:]]
        phi, g = (F.max_pool2d(f(x), size).flatten(2) for f in (self.phi, self.g))
        # Without a softmax the product may start from the right: (c, c) numbers, not (H W, K).
        relation = g @ phi.transpose(1, 2) / phi.shape[-1]
        y = self.out((relation @ self.theta(x).flatten(2)).unflatten(2, x.shape[-2:]))
        if y[:, :1].numel() == 1:  # BatchNorm2d refuses it; the same twice has the same statistics
            return x + self.norm(y.repeat(2, 1, 1, 1))[:1]
        return x + self.norm(y)


class FKD(DistillationLoss):
    """Compares features weighted by attention, their means, and outputs of non-local blocks.

    Zhang and Ma, "Improve Object Detection with Feature-based Knowledge Distillation: Towards
    Accurate and Efficient Detectors" (ICLR 2021).  Per level, with ``||.||`` the unsquared L2 norm
    over the whole batch::

        M^s(F)  = H W softmax_hw( mean_c |F| / T ),   M = (M^s(T) + M^s(S)) / 2, no gradient
        feature  = feature   ||sqrt(M) (T - A(S))||
        channel  = channel   ||mean_hw T - W mean_hw S||
        spatial  = spatial   ||mean_c T - conv3x3(mean_c S)||
        nonlocal = nonlocal_ ||NL_T(T) - A'(NL_S(S))||

    A and A' are 1x1 convolutions, W a linear layer, NL a :class:`NonLocal` block; the teacher's is
    random at the start and trained, as in the source, so the target moves.  A norm has a gradient
    of zero where both sides are equal.  The norms grow with sqrt(N H W) and the blocks normalise
    over the batch: values depend on batch size, resolution and padding, as published.

    Evidence: formulas, masks and blocks were read in mmrazor's port (``fbkd_loss.py``,
    ``fbkd_connector.py``) and in third-party copies of the authors' code; the authors' repository
    holds none.  The two-stage code does not use the channel mask
    ``M^c(F) = C softmax_c(mean_hw |F| / T)`` that it computes, the copies of the one-stage code do:
    ``channel_mask``.  Ours: the order of the products in NL (the same number, less memory), pooling
    on maps smaller than the pool, and no running statistics.

    Maps: (N, C_s, H, W) and (N, C_t, H, W).  Parameters of a level, with NL(C) those of a block:
    3 (C_s C_t + C_t) + 10 + NL(C_s) + NL(C_t); at 256 channels 330 378 with reduction 4, 461 834
    with reduction 2, 1 584 424 on p2..p5, 2 046 258 on p3..p7.

    Example::

        model.stages.fkd = L(Stage)(
            loss=L(FKD)(feature=7e-5, channel=4e-3, spatial=4e-3, nonlocal_=7e-5,
                        strides=[4, 8, 16, 32]),
            weight=1.0,
        )

    Args:
        feature, channel, spatial, nonlocal_: weights of the four terms ``s8_feature``, ...
        tap, strides: see :class:`DistillationLoss`.
        temperature: T; larger is more even.
        pool, reduction: of the non-local blocks, from the finest level in use to the coarsest.
        channel_mask: M has a factor (M^c(T) + M^c(S)) / 2 too; M^c(A(S)) where widths differ.

    Raises:
        ConfigError: a negative weight, a temperature that is not positive, a pool or reduction
            below one, or too few of them for the levels in use.
    """

    def __init__(
        self,
        feature: float,
        channel: float,
        spatial: float,
        nonlocal_: float,
        tap: str = "fpn",
        strides: Optional[List[int]] = None,
        temperature: float = 0.5,
        pool: Sequence[int] = (8, 4, 2, 2, 2),
        reduction: Sequence[int] = (4, 4, 2, 2, 2),
        channel_mask: bool = False,
    ):
        super().__init__(tap, strides)
        self.weights = dict(feature=feature, channel=channel, spatial=spatial, nonlocal_=nonlocal_)
        check_weights(**self.weights)
        check_number("temperature", temperature, above=0)
        for name, values in (("pool", pool), ("reduction", reduction)):
            if any(x != int(x) or x < 1 for x in values):
                raise ConfigError(name, list(values), "not all whole and positive", "use 1 or more")
        self.temperature = temperature
        self.pool = [int(x) for x in pool]
        self.reduction = [int(x) for x in reduction]
        self.channel_mask = channel_mask

    def bind(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        asked = self.strides
        super().bind(student, teacher, key)
        ours, theirs = student[self.tap], teacher[self.tap]
        asked = asked or self.strides  # the levels that the two lists speak of
        for name in ("pool", "reduction"):
            if len(getattr(self, name)) < len(asked):
                raise ConfigError(
                    f"{key}.{name}",
                    getattr(self, name),
                    f"has no number for each level of stride {asked}",
                    "give one per level, the finest first",
                )
        self.adapt = adapters(1, ours, theirs, self.strides, key)
        self.adapt_nonlocal = adapters(1, ours, theirs, self.strides, key)
        self.adapt_channel, self.adapt_spatial = nn.ModuleDict(), nn.ModuleDict()
        self.student_nonlocal, self.teacher_nonlocal = nn.ModuleDict(), nn.ModuleDict()
        for stride, reduction, pool in zip(asked, self.reduction, self.pool):
            if stride not in self.strides:
                continue
            s, t, name = ours[stride], theirs[stride], str(stride)
            self.adapt_channel[name] = nn.Linear(s, t)
            self.adapt_spatial[name] = nn.Conv2d(1, 1, 3, padding=1)
            self.student_nonlocal[name] = NonLocal(s, reduction, pool)
            self.teacher_nonlocal[name] = NonLocal(t, reduction, pool)

    def _attention(self, x: Tensor, dims: Sequence[int]) -> Tensor:
        """Softmax, scaled to mean one, of the mean magnitude over ``dims``: M^s or M^c."""
        mean = x.abs().mean(dims, keepdim=True)
        flat = (mean / self.temperature).flatten(1).softmax(1) * mean[0].numel()
        return flat.view_as(mean)

    @torch.no_grad()
    def _mask(self, s: Tensor, adapted: Tensor, t: Tensor) -> Tensor:
        """Compute sqrt(M): (N, 1, H, W), or (N, C, H, W) with the channel mask."""
        mask = (self._attention(s, (1,)) + self._attention(t, (1,))) / 2
        if self.channel_mask:
            s = s if s.shape[1] == t.shape[1] else adapted
            mask = mask * (self._attention(s, (2, 3)) + self._attention(t, (2, 3))) / 2
        return mask.sqrt()

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        norm, terms = torch.linalg.vector_norm, {}
        for stride, s, t in self.levels(batch):
            name, t = str(stride), t.detach()
            adapted = self.adapt[name](s)
            distances = dict(
                feature=norm(self._mask(s, adapted, t) * (t - adapted)),
                channel=norm(t.mean((2, 3)) - self.adapt_channel[name](s.mean((2, 3)))),
                spatial=norm(
                    t.mean(1, keepdim=True) - self.adapt_spatial[name](s.mean(1, keepdim=True))
                ),
                nonlocal_=norm(
                    self.teacher_nonlocal[name](t)
                    - self.adapt_nonlocal[name](self.student_nonlocal[name](s))
                ),
            )
            for part, distance in distances.items():
                terms[f"s{stride}_{part.rstrip('_')}"] = self.weights[part] * distance
        return terms
