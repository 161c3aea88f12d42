"""Cosine: the student's maps, projected, should point where the teacher's do."""

from typing import Dict, List, Optional

from torch import Tensor

from .base import Batch, DistillationLoss
from .distance import Distance

__all__ = ["Cosine"]


class Cosine(DistillationLoss):
    """Compares the direction of the projected student's features with that of the teacher's.

    For a teacher whose features have no detector's meaning or scale, such as those of a foundation model
    (:class:`~sharedkd.modeling.teachers.foundation.FoundationTeacher`)::

        L_l = mean over the positions on the images of ( 1 - cos( f_l(S_l), T_l ) )

    with a learned 1x1 convolution f_l a level.  OURS in its details: cosines with patch features of frozen
    networks are common (AM-RADIO, CVPR 2024; Theia, CoRL 2024 have them beside other terms); that each
    level of a pyramid learns from the one map is our reading.  Padding has no part.

    Maps: (N, C_s, H, W) and (N, C_t, H, W).  Parameters of a level: C_s C_t + C_t.

    Example::

        model.stages.cosine = L(Stage)(loss=L(Cosine)(), weight=1.0)

    Args:
        tap, strides: see :class:`DistillationLoss`.
        adapter: f_l, see :func:`~sharedkd.losses.adapter.adapters`.
    """

    adapts = True

    def __init__(
        self, tap: str = "fpn", strides: Optional[List[int]] = None, adapter: Optional[int] = 1
    ):
        super().__init__(tap, strides)
        self.adapter = adapter
        self.distance = Distance("cosine")

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        return {
            f"s{stride}": self.distance(
                self.adapters[str(stride)](s), t.detach(), batch.inside(s, stride)
            )
            for stride, s, t in self.levels(batch)
        }
