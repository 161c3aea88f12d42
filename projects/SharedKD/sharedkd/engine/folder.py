"""Checks of a run's output folder: it can be written to, holds no other run, and has room for checkpoints."""

import glob
import os
import shutil
import tempfile
from typing import Dict, Iterable, List, Mapping

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from sharedkd.errors import ConfigError
from sharedkd.modeling.meta_arch import losses_of, pairs_of

from .checkpoint import has_run

__all__ = ["check_disk", "check_output"]

KEY = "train.output_dir"


def check_output(output_dir: str, resume: bool) -> None:
    """Check that a run may use a folder, which need not exist.

    Args:
        resume: the folder may hold a run to resume.

    Raises:
        ConfigError: it cannot be written to, or holds what a run must not overwrite.
    """
    there = _existing(output_dir)
    if not os.path.isdir(there):
        raise ConfigError(KEY, output_dir, f"{there} is a file", "choose a folder")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as e:
        problem = f"{there} cannot be written to ({e.strerror})"
        raise ConfigError(KEY, output_dir, problem, "choose another folder") from e
    weights = _checkpoints(output_dir)
    if has_run(output_dir):
        if not resume:
            fix = "add --resume to continue that run, or choose another folder"
            raise ConfigError(KEY, output_dir, "holds another run's checkpoint", fix)
    elif weights:
        problem = f"holds {os.path.basename(weights[0])} of a run that cannot be resumed"
        raise ConfigError(KEY, output_dir, problem, "choose another folder")


def check_disk(
    cfg: DictConfig, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Mapping[str, float]:
    """Compare the space that checkpoints of ``model`` and ``optimizer`` need with what is free.

    Returns:
        ``checkpoint_mb``, the size of one; ``kept``, how many the folder holds at most; ``needed_mb``, for
        these and the one being written, beside those that a run to resume has; ``free_mb``.

    Raises:
        ConfigError: there is no room for one checkpoint beside the one before it.
    """
    train = cfg.train
    periodic = train.max_iter // train.checkpointer.period
    if train.checkpointer.max_to_keep is not None:
        periodic = min(periodic, train.checkpointer.max_to_keep)
    size = _checkpoint_bytes(model, optimizer) / 2**20
    there = sum(map(os.path.getsize, _checkpoints(train.output_dir))) / 2**20
    found: Dict[str, float] = {
        "checkpoint_mb": size,
        "kept": periodic + 1,  # and the final one
        "needed_mb": max(size * (periodic + 2) - there, size),
        "free_mb": shutil.disk_usage(_existing(train.output_dir)).free / 2**20,
    }
    if found["free_mb"] < max(2 * size - there, size):
        problem = (
            f"{found['free_mb']:.0f} MB are free on its disk, one checkpoint of {size:.0f} MB "
        )
        problem += "and the one before it do not fit"
        fix = "make room, or choose a folder on another disk"
        raise ConfigError(KEY, train.output_dir, problem, fix)
    return found


def _checkpoints(output_dir: str) -> List[str]:
    return glob.glob(os.path.join(glob.escape(output_dir), "*.pth"))


def _existing(path: str) -> str:
    """The absolute path of ``path`` if it exists, else of its nearest parent that does."""
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def _checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The size of a checkpoint: all students, the parameters of their losses, the optimizer's state."""
    options = optimizer.param_groups[0]
    per_parameter = 2 if "betas" in options else int(bool(options.get("momentum")))  # Adam's, SGD's
    size = per_parameter * _bytes(p for x in optimizer.param_groups for p in x["params"])
    for pair in pairs_of(model).values():
        for module in (pair, losses_of(pair)):
            size += _bytes(module.state_dict().values())
    return size


def _bytes(tensors: Iterable[Tensor]) -> int:
    """The size of ``tensors``; anything among them that is no tensor counts as 0."""
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))
