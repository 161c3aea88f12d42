"""Compares the detections of an exported file with those of the eager detector."""

from dataclasses import dataclass, field
from typing import Dict, Sequence

import torch
from torch import Tensor

__all__ = ["Agreement", "TOLERANCES", "UNMATCHED"]

#: How far detections may differ.  Both sides compute in float32, but sum in another order: measured
#: differences are about 1e-6 of the image and in scores, and these bounds leave room for deeper
#: networks. COCO's strictest threshold, IoU 0.95, moves a 32-pixel box's edge by more than a pixel.
TOLERANCES = {
    "boxes": 1e-4,  # times the longer edge of the image
    "scores": 1e-4,
    "masks": 1e-3,
}
#: Share of detections that may be on one side alone: a rounding can carry a score over the threshold,
#: or two boxes' overlap over that of non-maximum suppression.
UNMATCHED = 0.01


@dataclass
class Agreement:
    """The result of the comparisons so far."""

    images: int = 0
    empty: int = 0  #: images in which the eager detector detects nothing
    detections: int = 0  #: of the eager detector
    unmatched: int = 0  #: of either side, without a partner within :data:`TOLERANCES`
    #: Tensor -> largest difference of partners; of boxes in pixels.
    largest: Dict[str, float] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return self.unmatched <= UNMATCHED * self.detections

    def add(
        self,
        names: Sequence[str],
        eager: Sequence[Tensor],
        exported: Sequence[Tensor],
        size: Sequence[int],
    ) -> "Agreement":
        """Pair detections of the same class in one more image, best score first, with the nearest box.

        ``names`` are those of the tensors, and ``size`` is (H, W) of the image.
        """
        a, b = dict(zip(names, eager)), dict(zip(names, exported))
        bounds = {**TOLERANCES, "boxes": TOLERANCES["boxes"] * max(size)}
        free = torch.ones(len(b["scores"]), dtype=torch.bool)
        count = len(a["scores"])
        for i in range(count):
            distance = (b["boxes"] - a["boxes"][i]).abs().amax(1)
            distance += (b["scores"] - a["scores"][i]).abs()
            distance[~free | (b["classes"] != a["classes"][i])] = torch.inf
            if not distance.isfinite().any():
                continue
            j = distance.argmin()
            apart = {k: (a[k][i] - b[k][j]).abs().max().item() for k in names if k != "classes"}
            if all(value <= bounds[name] for name, value in apart.items()):
                free[j] = False
                self.largest = {k: max(x, self.largest.get(k, 0.0)) for k, x in apart.items()}
        unpaired = int(free.sum())
        self.images += 1
        self.empty += count == 0
        self.detections += count
        self.unmatched += count - (len(free) - unpaired) + unpaired
        return self
