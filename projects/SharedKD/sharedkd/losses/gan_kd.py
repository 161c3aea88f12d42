"""GAN-KD: the student learns maps that a discriminator takes for the teacher's."""

from typing import Dict, List, Optional

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sharedkd.values import check_number

from .base import Batch, DistillationLoss, Shapes
from .distance import masked_mean

__all__ = ["GanKD"]


class GanKD(DistillationLoss):
    """Trains a discriminator per level to tell teacher from student maps, and the student to fool it.

    In the style of GAN-Knowledge Distillation for One-Stage Object Detection (IEEE Access 2020).
    With D_l's logit for an image, f_l an adapter and D' = D with its parameters held fixed::

        L_l,discriminator = w * mean over images of
                            -log sigmoid(D_l(T_l)) - log(1 - sigmoid(D_l(sg(f_l(S_l)))))
        L_l,student       = mean over images of -log sigmoid(D'_l(f_l(S_l)))

    The first trains the discriminator only, the second the student (and adapter) only, so that one
    optimizer and one backward pass train both: no alternating steps.

    Evidence: the abstract and the first author's public README were read; it comes without code.
    Theirs: teacher maps are real, student maps fake samples; one small discriminator per level, a
    stack of downsampling convolutions (512 channels in the figure) that ends in one number; the
    adversarial term is added to the detector's losses with weight 1.  The README writes the plain
    difference D(T) - D(S) as the discriminator's loss and names nothing that keeps it bounded; the
    logistic losses above are the common form and OURS, as are the widths, LeakyReLU(0.2) and the
    mean over the last map, which makes D fully convolutional: any size down to one position.
    No BatchNorm: an image's loss does not depend on its batch.  Their student also takes over the
    trained teacher's SSD head; this loss leaves heads alone.

    D_l: ``layers`` times (conv 3x3 of stride 2, LeakyReLU), conv 1x1 to one logit, global mean.

    Shapes per level: student (N, C_s, H, W), teacher (N, C_t, H, W).  Parameters per level, with
    h = ``hidden``: (9*C_t*h + h) + (layers - 1) * (9*h^2 + h) + (h + 1), 221,441 at 256 channels,
    and the adapter's.

    Example::

        model.stages.gan = L(Stage)(loss=L(GanKD)(discriminator=1.0), weight=1.0)

    Args:
        tap, strides: see :class:`DistillationLoss`.
        discriminator: w, how fast discriminators learn relative to the student (with an optimizer
            whose steps follow the size of gradients, as SGD), above 0.
        hidden: channels inside a discriminator.
        layers: its downsampling convolutions.
        adapter: f_l, see :func:`~sharedkd.losses.adapter.adapters`; None: 1x1 where widths differ.
        ignore_padding: a discriminator sees nothing of the batch's padding and its mean leaves it
            out: an image's loss does not depend on how far it is padded.

    Raises:
        ConfigError: an option out of its range.
    """

    adapts = True

    def __init__(
        self,
        discriminator: float,
        tap: str = "fpn",
        strides: Optional[List[int]] = None,
        hidden: int = 64,
        layers: int = 3,
        adapter: Optional[int] = None,
        ignore_padding: bool = False,
    ):
        super().__init__(tap, strides)
        check_number("discriminator", discriminator, above=0)  # at 0 they would stay untrained
        for name, value in (("hidden", hidden), ("layers", layers)):
            check_number(name, value, least=1, whole=True)
        self.discriminator = discriminator
        self.hidden = hidden
        self.layers = layers
        self.adapter = adapter
        self.ignore_padding = ignore_padding

    def bind(self, student: Shapes, teacher: Optional[Shapes], key: str) -> None:
        super().bind(student, teacher, key)
        widths = teacher[self.tap]
        self.discriminators = nn.ModuleDict(
            {str(s): _Discriminator(widths[s], self.hidden, self.layers) for s in self.strides}
        )

    def forward(self, batch: Batch) -> Dict[str, Tensor]:
        terms = {}
        for stride, s, t in self.levels(batch):
            judge = self.discriminators[str(stride)]
            masks = self._masks(batch, s, stride)
            fake = self.adapters[str(stride)](s)
            # softplus(-x) = -log sigmoid(x), softplus(x) = -log(1 - sigmoid(x))
            caught = F.softplus(-judge(t.detach(), masks)) + F.softplus(judge(fake.detach(), masks))
            fixed = {name: p.detach() for name, p in judge.named_parameters()}
            fooled = F.softplus(-functional_call(judge, fixed, (fake, masks)))
            terms[f"s{stride}_discriminator"] = self.discriminator * caught.mean()
            terms[f"s{stride}_student"] = fooled.mean()
        return terms

    def _masks(self, batch: Batch, x: Tensor, stride: int) -> List[Optional[Tensor]]:
        """Where there is image: on the map and after each convolution of stride 2."""
        if not self.ignore_padding:
            return [None] * (self.layers + 1)
        masks = [
            batch.inside(x[..., :: 2**k, :: 2**k], stride * 2**k) for k in range(self.layers + 1)
        ]
        return [None if mask is None else mask.to(x.dtype) for mask in masks]


class _Discriminator(nn.Module):
    def __init__(self, channels: int, hidden: int, layers: int):
        super().__init__()
        widths = [channels] + [hidden] * layers
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:])
        )
        self.logit = nn.Conv2d(hidden, 1, 1)

    def forward(self, x: Tensor, masks: List[Optional[Tensor]]) -> Tensor:
        """(N, C, H, W) -> (N,) logits: teacher's (positive) or student's."""
        x = _masked(x, masks[0])
        for conv, mask in zip(self.convs, masks[1:]):
            x = _masked(F.leaky_relu(conv(x), 0.2), mask)
        return masked_mean(self.logit(x), masks[-1], (1, 2, 3))


def _masked(x: Tensor, mask: Optional[Tensor]) -> Tensor:
    return x if mask is None else x * mask
