"""Folds frozen batch norms into the convolutions before them."""

from typing import Iterator, Optional, Tuple

import torch
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = ["fold_norms"]

NORMS = (FrozenBatchNorm2d, nn.modules.batchnorm._BatchNorm)
# Their forward in eval mode is a scale and a shift, and nothing else.
_KNOWN = {
    x.forward
    for x in (
        FrozenBatchNorm2d,
        nn.modules.batchnorm._BatchNorm,
        nn.SyncBatchNorm,
        NaiveSyncBatchNorm,
    )
}


@torch.no_grad()
def fold_norms(module: nn.Module) -> int:
    """Fold every frozen batch norm that follows a convolution into it, in place.

    A norm with fixed statistics is a scale and a shift per channel, which a convolution's
    weight and bias can express::

        norm(w * x + b) = (w * s) * x + ((b - mean) * s + shift),   s = scale / sqrt(var + eps)

    It is found as Detectron2's ``Conv2d.norm``, or as the module registered after a plain
    convolution in the same parent, which is how RegNet and torchvision place it.  GroupNorm and
    LayerNorm depend on the input and stay; so does a norm with hooks, without running statistics or
    with a forward of its own, such as timm's ``BatchNormAct2d``, which contains an activation.

    Args:
        module: a network in eval mode.

    Returns:
        the number of folded norms.

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


def _pairs(module: nn.Module) -> Iterator[Tuple[nn.Module, str, nn.Conv2d]]:
    """(owner of the norm, its name there, the convolution before it)"""
    for parent in module.modules():
        if isinstance(parent, nn.Conv2d) and _is_plain(getattr(parent, "norm", None)):
            yield parent, "norm", parent
        previous: Optional[nn.Module] = None
        for name, child in parent.named_children():
            if (
                _is_plain(child)
                and isinstance(previous, nn.Conv2d)
                and previous.out_channels == child.num_features
                and getattr(previous, "norm", None) is None
                and getattr(previous, "activation", None) is None
            ):
                yield parent, name, previous
            previous = child


def _is_plain(norm: Optional[nn.Module]) -> bool:
    """Whether ``norm`` is a batch norm and nothing more."""
    return isinstance(norm, NORMS) and type(norm).forward in _KNOWN
