"""The disk space that a run's checkpoints will need, computed before the first one is written."""

import os
import shutil
import tempfile
from typing import Dict, Iterable, Mapping

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from sharedkd.errors import ConfigError
from sharedkd.modeling.meta_arch import losses_of, pairs_of

__all__ = ["check_disk", "check_folder", "checkpoint_bytes", "existing_folder", "tensor_bytes"]


def existing_folder(path: str) -> str:
    """The absolute path of ``path`` if it exists, else of its nearest parent that does."""
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def check_folder(key: str, path: str) -> None:
    """Check that files can be written to a folder.

    Args:
        key: the config key that names it, for messages.
        path: need not exist.

    Raises:
        ConfigError: it is a file, or below one, or cannot be written to.
    """
    there = existing_folder(path)
    if not os.path.isdir(there):
        raise ConfigError(key, path, f"{there} is a file", "choose a folder")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as e:
        raise ConfigError(
            key, path, f"{there} cannot be written to ({e.strerror})", "choose another folder"
        ) from e


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The size of a checkpoint in bytes.

    It holds the student of ``model`` and its peers, the parameters of their losses, and the state that
    ``optimizer`` has after a step.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    size = _state_per_parameter(optimizer) * tensor_bytes(trained)
    for pair in pairs_of(model).values():
        for module in (pair, losses_of(pair)):
            size += tensor_bytes(module.state_dict().values())
    return size


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Total bytes of ``tensors``; anything among them that is no tensor counts as 0."""
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


def _state_per_parameter(optimizer: torch.optim.Optimizer) -> int:
    """The numbers that SGD or an Adam-like optimizer stores per trained number."""
    options = optimizer.param_groups[0]
    return 2 if "betas" in options else int(bool(options.get("momentum")))


def check_disk(
    cfg: DictConfig, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Mapping[str, float]:
    """Compare the space that the output folder will need with the free space on its disk.

    Args:
        cfg: the run's config; ``train`` is read.
        model, optimizer: the contents of a checkpoint, see :func:`checkpoint_bytes`.

    Returns:
        ``checkpoint_mb``, the size of one; ``kept``, how many the folder holds at most; ``needed_mb``, for
        these and the one being written; ``free_mb``.

    Raises:
        ConfigError: there is no room for one checkpoint beside the one before it.
    """
    train = cfg.train
    periodic = train.max_iter // train.checkpointer.period
    if train.checkpointer.max_to_keep is not None:
        periodic = min(periodic, train.checkpointer.max_to_keep)
    size = checkpoint_bytes(model, optimizer) / 2**20
    found: Dict[str, float] = {
        "checkpoint_mb": size,
        "kept": periodic + 1,  # and the final one
        "needed_mb": size * (periodic + 2),
        "free_mb": shutil.disk_usage(existing_folder(train.output_dir)).free / 2**20,
    }
    if found["free_mb"] < 2 * size:
        raise ConfigError(
            "train.output_dir",
            train.output_dir,
            f"{found['free_mb']:.0f} MB are free on its disk, one checkpoint of {size:.0f} MB and the "
            "one before it do not fit",
            "make room, or choose a folder on another disk",
        )
    return found
