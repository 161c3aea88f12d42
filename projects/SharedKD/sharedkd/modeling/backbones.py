"""Other ways to run the same backbone: compiled, or with less memory."""

from contextlib import nullcontext
from functools import partial
from typing import Sequence

import torch
from detectron2.layers import CNNBlockBase, NaiveSyncBatchNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from sharedkd.errors import ConfigError

__all__ = ["compile_backbone", "recompute_blocks"]

KEY = "train.activation_checkpointing"


def compile_backbone(
    detector: nn.Module, backend: str = "inductor", key: str = "train.compile"
) -> None:
    """Compile a detector's bottom-up network, for images of changing sizes.

    Args:
        detector: the ``forward`` of its bottom-up network (or whole backbone) is replaced.
        backend: of ``torch.compile``.
        key: the config key that asks for it, for messages.

    Raises:
        ConfigError: a detector without a ``backbone``.
    """
    backbone = getattr(detector, "backbone", None)
    if backbone is None:
        raise ConfigError(
            key, True, f"{type(detector).__name__} has no backbone", f"use {key}=False"
        )
    part = getattr(backbone, "bottom_up", backbone)
    # Only the forward: hooks on its maps stay outside, and the names of parameters do not change.
    part.forward = torch.compile(part.forward, backend=backend, dynamic=True)


def recompute_blocks(detector: nn.Module) -> int:
    """Activation checkpointing: trained residual blocks compute their activations again for the backward.

    Gradients and the running statistics of batch norms stay the same; a block's forward runs
    twice a step.

    Args:
        detector: with a ResNet, a RegNet or another backbone of Detectron2's ``CNNBlockBase``.

    Returns:
        the number of blocks.

    Raises:
        ConfigError: a backbone without such blocks, or a norm whose statistics a second forward
            would change.
    """
    backbone = getattr(detector, "backbone", detector)
    blocks = [
        block
        for block in backbone.modules()
        if isinstance(block, CNNBlockBase) and any(p.requires_grad for p in block.parameters())
    ]
    if not blocks:
        raise ConfigError(
            KEY,
            True,
            f"{type(backbone).__name__} has no residual blocks that are trained",
            f"use {KEY}=False, and the backbone's own option if it has one",
        )
    for block in blocks:
        norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
        if any(isinstance(m, NaiveSyncBatchNorm) for m in norms):
            raise ConfigError(
                KEY,
                True,
                "naiveSyncBN would count every image twice",
                "use norm=SyncBN or FrozenBN",
            )
        block.forward = partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=False,  # these blocks draw nothing
            context_fn=lambda norms=norms: (nullcontext(), _StatisticsKept(norms)),
        )
    return len(blocks)


class _StatisticsKept:
    """A context in which a second forward normalises as the first, and changes no statistics.

    It may be entered several times: a step's graph may be differentiated more than once.
    """

    def __init__(self, norms: Sequence[_BatchNorm]):
        self._norms = [norm for norm in norms if norm.training and norm.track_running_stats]

    def __enter__(self) -> None:
        self._before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in self._norms]
        for norm in self._norms:
            norm.momentum = 0.0

    def __exit__(self, *exception: object) -> None:
        for norm, (momentum, count) in zip(self._norms, self._before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
