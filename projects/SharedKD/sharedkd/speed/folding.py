"""Frozen batch norms become part of the convolution before them, for good or anew in every step."""

from typing import Iterator, Optional, Tuple

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = ["fold_in_training", "fold_norms"]

NORMS = (FrozenBatchNorm2d, nn.modules.batchnorm._BatchNorm)


@torch.no_grad()
def fold_norms(module: nn.Module) -> int:
    """Fold every frozen batch norm that follows a convolution into it, in place.

    A norm with fixed statistics is a scale and a shift per channel, and so is what a convolution's
    weight and bias can express::

        norm(w * x + b) = (w * s) * x + ((b - mean) * s + shift),   s = scale / sqrt(var + eps)

    It is found as Detectron2's ``Conv2d.norm``, or as the module registered after a plain
    convolution in the same parent, which is how RegNet and torchvision place it.  GroupNorm and
    LayerNorm depend on the input and stay; so does a norm with hooks or without running statistics.

    Args:
        module: a network in eval mode.

    Returns:
        how many norms are gone.

    Raises:
        ValueError: a batch norm is in training mode, so that its statistics are not fixed.
    """
    count = 0
    for owner, name, conv in list(_pairs(module)):
        norm = getattr(owner, name)
        if norm.training and not isinstance(norm, FrozenBatchNorm2d):
            raise ValueError("a batch norm in training mode has no fixed statistics to fold")
        if norm.running_mean is None or norm._forward_hooks or norm._forward_pre_hooks:
            continue
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        for each in (conv.weight, conv.bias):
            each.requires_grad_(False)
        setattr(owner, name, None if owner is conv else nn.Identity())
        count += 1
    return count


def fold_in_training(module: nn.Module) -> int:
    """Fold frozen norms into the convolutions of a network that is being trained, in every step.

    The formula is that of :func:`fold_norms`.  The convolution's weight stays the parameter that it
    was, names and checkpoints too; in training, the product ``w * s`` takes the norm's place, so that
    no map is written twice.  Outputs and gradients are equal up to rounding.  In eval mode, nothing
    changes at all.  Of a 1x1 convolution with a stride, only the positions that it reads are passed on:
    oneDNN's gradient of one takes longer on a CPU with channels first.

    Args:
        module: its Detectron2 ``Conv2d`` layers with a ``FrozenBatchNorm2d`` are changed in place.

    Returns:
        how many norms are folded.
    """
    convs = [
        m
        for m in module.modules()
        if type(m) is Conv2d
        and type(m.norm) is FrozenBatchNorm2d
        and not (m.norm._forward_hooks or m.norm._forward_pre_hooks)
    ]
    for conv in convs:
        conv.__class__ = _FoldedConv2d
    return len(convs)


class _FoldedConv2d(Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, H', W')"""
        if not self.training:
            return super().forward(x)
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        weight = self.weight * scale.view(-1, 1, 1, 1)
        stride = self.stride
        if self._skips_positions(x):
            x, stride = x[:, :, :: stride[0], :: stride[1]], 1
        x = F.conv2d(x, weight, shift, stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def _skips_positions(self, x: Tensor) -> bool:
        skips = self.stride != (1, 1) and self.kernel_size == (1, 1) and self.padding == (0, 0)
        first = not x.is_contiguous(memory_format=torch.channels_last)
        return skips and first and x.device.type == "cpu"


def _pairs(module: nn.Module) -> Iterator[Tuple[nn.Module, str, nn.Conv2d]]:
    """(owner of the norm, its name there, the convolution before it)"""
    for parent in module.modules():
        if isinstance(parent, nn.Conv2d) and isinstance(getattr(parent, "norm", None), NORMS):
            yield parent, "norm", parent
        previous: Optional[nn.Module] = None
        for name, child in parent.named_children():
            if (
                isinstance(child, NORMS)
                and isinstance(previous, nn.Conv2d)
                and previous.out_channels == child.num_features
                and getattr(previous, "norm", None) is None
                and getattr(previous, "activation", None) is None
            ):
                yield parent, name, previous
            previous = child
