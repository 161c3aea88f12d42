"""Checkpoint files read as data, in every layout that Detectron2 knows, and safetensors written."""

import mmap
import os
import pickle
from typing import Any, Dict, Mapping

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from sharedkd.files import replace

from .torchfile import check_torch_file
from .unpickler import ArrayUnpickler, Refused, plain_name

__all__ = ["read_weights", "write_safetensors"]


def read_weights(path: str, trusted: bool = False) -> Dict[str, Any]:
    """Read a checkpoint file without running anything that is in it.

    Args:
        path: ``.pkl`` is a pickle of Detectron2's or Caffe2's zoo, ``.safetensors`` is that, and
            ``.pyth`` (pycls), ``.pth`` and any other name are PyTorch's.
        trusted: read it with loaders that run what the file asks for.

    Returns:
        what Detectron2's checkpointers read: ``model`` (name -> tensor or array), and beside it
        ``matching_heuristics`` with ``__author__``, or the other entries of a ``.pth``.

    Raises:
        Refused: the file asks for more than data.
        ValueError, or any other exception: the file is broken, or holds no weights.
    """
    if not os.path.getsize(path):
        raise ValueError("it is empty")
    kind = os.path.splitext(path)[1]
    if kind == ".safetensors":
        return {"model": _state(safetensors.torch.load_file(path))}
    try:
        data = (_run if trusted else _read)(path, kind)
    except EOFError as e:
        raise ValueError("it is cut short") from e
    if not isinstance(data, dict):
        raise ValueError("it holds no dictionary of weights")
    if kind == ".pkl":
        return _of_a_zoo(data)
    if kind == ".pyth":
        state = {k: v for k, v in data["model_state"].items() if "num_batches_tracked" not in k}
        return {"model": _state(state), "__author__": "pycls", "matching_heuristics": True}
    data = data if "model" in data else {"model": data}
    _state(data["model"])
    return data


def _read(path: str, kind: str) -> Any:
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if kind == ".pkl":
            return ArrayUnpickler(data, len(data)).load()
        check_torch_file(f, data)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise Refused("what PyTorch does not read with weights_only=True") from e


def _run(path: str, kind: str) -> Any:
    if kind == ".pkl":
        with open(path, "rb") as f:
            return pickle.load(f, encoding="latin1")
    return torch.load(path, map_location="cpu", weights_only=False)


def _of_a_zoo(data: Dict[str, Any]) -> Dict[str, Any]:
    if "model" in data and "__author__" in data:
        return {
            "model": _state(data["model"]),
            "__author__": plain_name(data["__author__"]) if type(data["__author__"]) is str else "",
            "matching_heuristics": data.get("matching_heuristics") is True,
        }
    blobs = data.get("blobs", data)  # detectors have them, ImageNet models do not
    arrays = {
        name: x
        for name, x in blobs.items()
        if isinstance(x, np.ndarray) and not name.endswith("_momentum")
    }
    return {"model": _state(arrays), "__author__": "Caffe2", "matching_heuristics": True}


def _state(state: Any) -> Mapping[str, Any]:
    if not isinstance(state, dict) or not state:
        raise ValueError("it holds no weights")
    for name, x in state.items():
        if not isinstance(name, str) or not name.isprintable():  # they appear on terminals
            raise ValueError(f"a tensor is called {plain_name(name)}")
        if not isinstance(x, (np.ndarray, Tensor)):
            raise ValueError(f"{name} is no tensor but a {type(x).__name__}")
    return state


def write_safetensors(state: Mapping[str, Tensor], path: str) -> None:
    """Write ``state`` in the format that cannot hold code; ``path`` appears complete or not at all.

    Raises:
        OSError: see :func:`sharedkd.files.replace`.
    """
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in state.items()}
    replace(path, lambda f: f.write(safetensors.torch.save(tensors, {"format": "pt"})))
