"""SemCKD for detectors: each student level learns from all teacher levels, by attention."""

from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharedkd.values import check_number

from .alignment import pool_to
from .base import Batch, DistillationLoss, Shapes
from .distance import masked_mean

__all__ = ["SemCKD"]

EPS = 1e-6  # under a vector's norm: a vector of zeros has a finite gradient


class SemCKD(DistillationLoss):
    """Each student level imitates all teacher levels, in shares that attention sets per image.

    Cross-Layer Distillation with Semantic Calibration (AAAI 2021), for classification, adapted to
    detection.  With n_s student and n_t teacher levels, for student level i::

        L_i    = 1 / n_s * mean over images b of sum_j alpha_bij MSE(R_ij(down(S_i)), down(T_j))_b
        alpha  = softmax over j of q_bi . k_bj / temperature
        q_bi   = unit(MLP_i(d(S_i)_b)),   k_bj = unit(MLP'_j(d(T_j)_b)),   unit(v) = v / ||v||

    The sum of all L_i is the published loss.  MSE is the mean over an image's own channels and
    positions, R_ij a regressor per pair of levels (conv 1x1, ReLU, conv 3x3, ReLU, conv 1x1), down
    the average pooling of the finer map to the coarser one's size, MLP a Linear, ReLU, Linear.  As
    in the source the student's map is pooled before the regressor, and it receives a gradient
    through the attention too.

    Evidence: the authors' public code was read (the attention, the regressors with twice the
    teacher's channels in between, MLPs from D to D/2 to D/4 values, attention scale 1).  What
    differs here is OUR adaptation:

    * The source describes an image by its row of the B x B similarities of the batch, so its MLPs
      fit one batch size only.  Here d is the similarity of places within one image: the map is
      averaged over g x g equal cells of the image, and d holds the g^4 cosines between the cells'
      channel vectors.  Its size depends neither on the batch, nor on channels, nor on resolution.
    * Vectors are made unit with 1e-6 added to their squared length: finite gradients at zero.
    * No BatchNorm in the regressors (convolutions have a bias instead): an image's loss does not
      depend on the other images, and the loss of a batch is the mean of the losses of its images.
    * Maps need not be square, and pooling averages whole blocks by the ratio of strides.
    * Padding: positions on it take no part in pooling, cells, regressors or means, so that an
      image's loss does not depend on how far it is padded (``ignore_padding=False``: all do).

    Shapes: student (N, C_i, H_i, W_i), teacher (N, C_j, H_j, W_j); levels are the common strides of
    the two pyramids, so n_s = n_t = n.

    Parameters, with D = g^4, h_j = ``hidden`` or 2*C_j::

        sum_ij (C_i*h_j + h_j) + (9*h_j^2 + h_j) + (h_j*C_j + C_j)        # regressors
        + 2*n * ((D * D/2 + D/2) + (D/2 * D/4 + D/4))                     # queries and keys

    5 x 5 levels at 256 channels: 25 * 2,622,720 + 10 * 41,152 = 65,979,520 (``hidden=64``: 25 *
    70,016 + 411,520 = 2,161,920).  On the backbone's stages set ``hidden``: the default is 4096 for
    a stage of 2048 channels.

    Example::

        model.stages.semckd = L(Stage)(loss=L(SemCKD)(tap="fpn"), weight=1.0)

    Args:
        tap, strides: see :class:`DistillationLoss`.
        hidden: channels inside a regressor; None: twice the teacher level's, as in the source.
        grid: g, at least 2.
        temperature: divides the attention's energies, above 0; the source's default is 1.
        ignore_padding: leave positions on the batch's padding out of everything.

    Raises:
        ConfigError: an option out of its range.
    """

    def __init__(
        self,
        tap: str = "fpn",
        strides: Optional[List[int]] = None,
        hidden: Optional[int] = None,
        grid: int = 4,
        temperature: float = 1.0,
        ignore_padding: bool = True,
    ):
        super().__init__(tap, strides)
        check_number("hidden", hidden, least=1, whole=True, or_null=True)
        check_number("grid", grid, least=2, whole=True)
        check_number("temperature", temperature, above=0)
        self.hidden = hidden
        self.grid = grid
        self.temperature = temperature
        self.ignore_padding = ignore_padding

    def bind(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        super().bind(student, teacher, key)
        ours, theirs = student[self.tap], teacher[self.tap]
        self.queries = nn.ModuleDict({str(i): _embedding(self.grid**4) for i in self.strides})
        self.keys = nn.ModuleDict({str(j): _embedding(self.grid**4) for j in self.strides})
        self.regressors = nn.ModuleDict(
            {
                f"{i}_{j}": _Regressor(ours[i], self.hidden or 2 * theirs[j], theirs[j])
                for i in self.strides
                for j in self.strides
            }
        )

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        students, teachers, masks, queries, keys = {}, {}, {}, [], []
        for stride, s, t in self.levels(batch):
            mask = batch.inside(s, stride) if self.ignore_padding else None
            masks[stride] = None if mask is None else mask.to(s.dtype)
            students[stride], teachers[stride] = s, t.detach()
            cells = self._cells(s, stride, batch)
            queries.append(_unit(self.queries[str(stride)](self._describe(s, *cells))))
            keys.append(_unit(self.keys[str(stride)](self._describe(t.detach(), *cells))))
        energy = torch.stack(queries, 1) @ torch.stack(keys, 2)  # (N, n, n)
        attention = (energy / self.temperature).softmax(-1)

        terms = {}
        for a, i in enumerate(self.strides):
            errors = []
            for j in self.strides:
                coarse = max(i, j)
                mask, size = masks[coarse], students[coarse].shape[-2:]
                s = _down(students[i], coarse // i, masks[i], size)
                t = _down(teachers[j], coarse // j, masks[j], size)
                square = (self.regressors[f"{i}_{j}"](s, mask) - t).square().mean(1, keepdim=True)
                errors.append(masked_mean(square, mask, (1, 2, 3)))
            share = (attention[:, a] * torch.stack(errors, 1)).sum(1)
            terms[f"s{i}"] = share.mean() / len(self.strides)
        return terms

    def _cells(self, x: Tensor, stride: int, batch: Batch) -> Tuple[Tensor, Tensor]:
        """Compute the share of each row and column of cells on each row and column of the map.

        Returns:
            (N, g, H) and (N, g, W), each summing to one over its last dimension.
        """
        height, width = x.shape[-2:]
        sizes = [(height, width)] * len(x)
        if self.ignore_padding:
            sizes = [
                (min(-(-h // stride), height), min(-(-w // stride), width))
                for h, w in batch.image_sizes
            ]
        there = torch.tensor(sizes, dtype=x.dtype).to(x.device, non_blocking=True)  # no wait
        rows, columns = there.unbind(1)
        return self._overlap(rows, height), self._overlap(columns, width)

    def _overlap(self, length: Tensor, size: int) -> Tensor:
        """(N, g, size): the share of cell k of an axis of ``length`` on the unit interval at y."""
        step = (length / self.grid).view(-1, 1, 1)
        low = torch.arange(self.grid, device=length.device).view(1, -1, 1) * step
        y = torch.arange(size, device=length.device, dtype=length.dtype)
        return (torch.minimum(y + 1, low + step) - torch.maximum(y, low)).clamp(min=0) / step

    @staticmethod
    def _describe(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, g^4): the cosines between the mean vectors of the image's cells."""
        cells = rows.unsqueeze(1) @ x @ columns.transpose(1, 2).unsqueeze(1)
        cells = _unit(cells.flatten(2).transpose(1, 2))
        return (cells @ cells.transpose(1, 2)).flatten(1)


class _Regressor(nn.Module):
    """Maps a student level to a teacher level's channels; positions off the mask have no influence."""

    def __init__(self, channels: int, hidden: int, out: int):
        super().__init__()
        self.enter = nn.Conv2d(channels, hidden, 1)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.leave = nn.Conv2d(hidden, out, 1)

    def forward(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        x = F.relu(self.enter(x))
        x = x if mask is None else x * mask
        return self.leave(F.relu(self.mix(x)))


def _embedding(size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, size // 2), nn.ReLU(), nn.Linear(size // 2, size // 4))


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + EPS).sqrt()


def _down(x: Tensor, ratio: int, mask: Optional[Tensor], size: Tuple[int, ...]) -> Tensor:
    """Average of each block of ratio x ratio positions, of those that exist and are in the mask.

    Blocks start at the top left corner, so that the padding moves none; a last one may be cut.
    """
    if ratio > 1:
        whole = F.avg_pool2d(x if mask is None else x * mask, ratio, ratio, ceil_mode=True)
        if mask is not None:
            share = F.avg_pool2d(mask, ratio, ratio, ceil_mode=True)
            whole = whole / share.clamp(min=0.5 / ratio**2)
        x = pool_to(whole, size)  # nothing to do unless a backbone rounds sizes down
    return x
