"""Gaps between the levels of two pyramids: teacher-student, teacher-teacher and student-student.

The maps of one tap of a pair are the nodes ("student", stride) and ("teacher", stride); every pair of
nodes is measured on every image, or for CKA on every minibatch of images.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from sharedkd.lab.scores import Difference, interval
from sharedkd.losses.alignment import Pooled
from sharedkd.losses.base import Batch, precise

from .similarity import MEASURES, aligned, cka, gap, hsic, u_centred

__all__ = ["KINDS", "QUANTITIES", "GapMeter", "Gaps"]

#: Of CKA: images per minibatch, and how many positions of an image are examples, at most.
MINIBATCH, POSITIONS = 8, 32
Node = Tuple[str, int]  #: ("student" or "teacher", stride)

#: The matrices: rows-columns.
KINDS = ("student-teacher", "student-student", "teacher-teacher")
#: What the verdicts are about, each a mean over level pairs; l < k are strides that both have.
QUANTITIES = {
    "identical": "student l - teacher l: the same level of both",
    "inner": "student l - student k: cross-layer, inside the student",
    "cross": "student l - teacher k and student k - teacher l: cross-layer, to the teacher",
    "teacher": "teacher l - teacher k: cross-layer, inside the teacher",
}


class GapMeter:
    """Takes the maps of a tap image by image and measures every pair of levels.

    MSE and cosine compare maps as the losses do: the larger is pooled to the smaller's size, the
    wider is cropped to the narrower's first channels, padding is left out.  CKA compares the same
    pooled maps with all channels of both; its examples are positions, drawn at random from the
    images of a minibatch, the same ones for all maps and for each meter.

    ``normalize`` is of the MSE, as in the pair's loss.
    """

    def __init__(
        self, normalize: str = "instance", minibatch: int = MINIBATCH, positions: int = POSITIONS
    ):
        self.normalize, self.minibatch, self.positions = normalize, minibatch, positions
        self._draw = np.random.default_rng(0)
        self.nodes: List[Node] = []
        self._images: Dict[str, List[np.ndarray]] = {"mse": [], "cosine": []}
        self._hsic: List[np.ndarray] = []  # of each minibatch
        # Of each image since the last minibatch.
        self._examples: List[Dict[Tuple[Node, int], Tensor]] = []

    def add(
        self,
        student: Mapping[int, Tensor],
        teacher: Mapping[int, Tensor],
        image_size: Tuple[int, int],
    ) -> None:
        """Measure one image of (height, width) pixels without padding.

        Both are stride -> (1, C, H, W), and of one size at a stride that both have.
        """
        maps = {("student", s): Pooled(precise(x)) for s, x in sorted(student.items())}
        maps.update({("teacher", s): Pooled(precise(x)) for s, x in sorted(teacher.items())})
        self.nodes = list(maps)
        batch = Batch({"": dict(student)}, None, [image_size])
        at_stride = {stride: pool.x for (_, stride), pool in maps.items()}
        masks = {stride: batch.inside(x, stride) for stride, x in at_stride.items()}
        found = {"mse": np.zeros((len(maps),) * 2), "cosine": np.eye(len(maps))}
        for (i, a), (j, b) in combinations(enumerate(maps), 2):
            mask = masks[max(a[1], b[1])]
            for name, value in aligned(maps[a], maps[b], self.normalize, mask).items():
                found[name][i, j] = found[name][j, i] = value
        for name, values in found.items():
            self._images[name].append(values)
        examples = {}
        for stride, x in at_stride.items():
            picked = self._pick(x, masks[stride])
            for node, pool in maps.items():
                if stride >= node[1]:  # where it meets a map of that stride
                    rows = pool.to(tuple(x.shape[-2:]))[0].flatten(1).T
                    examples[node, stride] = rows[picked].cpu()
        self._examples.append(examples)
        if len(self._examples) == self.minibatch:
            self._close_minibatch()

    def _pick(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Positions of a map outside of padding; fewer if there are not as many."""
        there = np.arange(x.shape[-2] * x.shape[-1])
        if mask is not None:
            there = there[mask.flatten().cpu().numpy()]
        return torch.from_numpy(self._draw.permutation(there)[: self.positions])

    def _close_minibatch(self) -> None:
        grams = {
            key: u_centred(torch.cat([rows[key] for rows in self._examples]))
            for key in self._examples[0]
        }
        found = np.full((len(self.nodes), len(self.nodes), 3), np.nan)
        for i, a in enumerate(self.nodes):
            for j, b in enumerate(self.nodes):
                stride = max(a[1], b[1])
                x, y = grams[a, stride], grams[b, stride]
                found[i, j] = hsic(x, y), hsic(x, x), hsic(y, y)
        self._hsic.append(found)
        self._examples.clear()

    def result(self) -> "Gaps":
        """The measurements; the images left over from the last minibatch form one of their own."""
        if self._examples:
            self._close_minibatch()
        estimates = np.stack(self._hsic)  # (minibatches, nodes, nodes, 3)
        size = range(len(self.nodes))
        of = lambda x: np.array([[cka(*x[:, i, j].T) for j in size] for i in size])  # noqa: E731
        values = {name: np.stack(arrays) for name, arrays in self._images.items()}
        values["cka"] = np.stack([of(x[None]) for x in estimates])
        return Gaps(self.nodes, values, of(estimates))


@dataclass
class Gaps:
    """What a :class:`GapMeter` measured of all level pairs."""

    nodes: List[Node]  #: the maps
    values: Dict[str, np.ndarray]  #: measure -> (images, nodes, nodes), of CKA (minibatches, ...)
    cka: np.ndarray  #: (nodes, nodes), over all minibatches

    def matrix(self, kind: str, measure: str) -> Dict[str, Any]:
        """A measure of one of the :data:`KINDS` of level pairs, as it is and not as a gap.

        Returns:
            "rows" and "columns" (strides), "mean" and "sd" over images or minibatches.  The "mean" of
            CKA is its estimate from all minibatches together.
        """
        sides = kind.split("-")
        index = np.ix_(*([i for i, node in enumerate(self.nodes) if node[0] == x] for x in sides))
        values = np.stack([x[index] for x in self.values[measure]])
        rows, columns = map(self._strides, sides)
        return {
            "rows": rows,
            "columns": columns,
            "mean": (self.cka[index] if measure == "cka" else values.mean(0)).tolist(),
            "sd": (values.std(0, ddof=1) if len(values) > 1 else values[0] * np.nan).tolist(),
        }

    def _strides(self, who: str) -> List[int]:
        return [stride for name, stride in self.nodes if name == who]

    def level_pairs(self) -> List[Tuple[int, int]]:
        """(l, k), l < k, of the strides that both have."""
        both = [s for s in self._strides("student") if s in self._strides("teacher")]
        return list(combinations(both, 2))

    def quantity(
        self, name: str, measure: str, pairs: Sequence[Tuple[int, int]] = ()
    ) -> np.ndarray:
        """One of :data:`QUANTITIES` as a gap, a value per image, or of CKA per minibatch.

        ``pairs`` are (l, k), by default all.
        """
        student, teacher = "student", "teacher"
        columns = []
        for fine, deep in pairs or self.level_pairs():
            ends: Dict[str, List[Tuple[Node, Node]]] = {
                # Each level is in as many pairs as any other.
                "identical": [((student, x), (teacher, x)) for x in (fine, deep)],
                "inner": [((student, fine), (student, deep))],
                "cross": [((student, x), (teacher, y)) for x, y in ((fine, deep), (deep, fine))],
                "teacher": [((teacher, fine), (teacher, deep))],
            }
            at = self.nodes.index
            columns += [self.values[measure][:, at(a), at(b)] for a, b in ends[name]]
        return gap(measure, np.stack(columns, axis=1)).mean(axis=1)

    def record(self) -> Dict[str, Any]:
        """For features.json: "matrices" (kind -> measure), "quantities", and "inner_minus_cross"."""
        inner_minus_cross = {}
        for m in MEASURES:
            pairs = {f"{x}-{y}": self._inner_minus_cross(m, (x, y)) for x, y in self.level_pairs()}
            inner_minus_cross[m] = {**self._inner_minus_cross(m), "pairs": pairs}
        quantities = {m: {q: _interval(self.quantity(q, m)) for q in QUANTITIES} for m in MEASURES}
        matrices = {kind: {m: self.matrix(kind, m) for m in MEASURES} for kind in KINDS}
        return {
            "matrices": matrices,
            "quantities": quantities,
            "inner_minus_cross": inner_minus_cross,
        }

    def _inner_minus_cross(self, measure: str, *pairs: Tuple[int, int]) -> Dict[str, Any]:
        inner, cross = (self.quantity(name, measure, pairs) for name in ("inner", "cross"))
        return Difference.of(inner - cross, ("smaller", "larger", "value")).record()


def _interval(values: np.ndarray) -> Dict[str, Any]:
    mean, half_width = interval(values[~np.isnan(values)])
    return {"mean": mean, "half_width": half_width}
