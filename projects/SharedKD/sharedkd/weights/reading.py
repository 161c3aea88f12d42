"""Reads checkpoint files as data, in every layout that Detectron2 knows, and writes safetensors."""

import io
import mmap
import os
import pickle
import re
import stat
import zipfile
from typing import IO, Any, Dict, Mapping

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from sharedkd.files import replace

from .pickles import Array, Refused, ZooUnpickler, check_pickle, plain_name

__all__ = ["read_weights", "write_safetensors"]

LONGEST_DIRECTORY = 2**23  # bytes of a zip archive's table of contents: about 80,000 entries

#: What a trained detector's .pth names.  ``weights_only`` knows more names, some of which take memory
#: of any size: ``bytearray``, ``UntypedStorage``.
TORCH_NAMES = re.compile(
    r"_codecs encode|collections (OrderedDict|Counter)|torch (Size|device|bool)"
    r"|torch (b?float|complex|u?int)\d+|torch\._utils _rebuild_(tensor|parameter)(_v2|_with_state)?"
    r"|torch (Double|B?Float(16)?|Half|Long|Int|Short|Char|Byte|Bool|Complex(Float|Double))Storage"
)


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
        ValueError, or any other exception: the file is damaged, or holds no weights.
    """
    if not os.path.getsize(path):
        raise ValueError("it is empty")
    kind = os.path.splitext(path)[1].partition("?")[0]  # of a URL
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
    if "model" not in data and "state_dict" in data:
        raise ValueError(
            "its weights are under state_dict, as MMDetection and Lightning save them, and not in "
            "Detectron2's layout or names"
        )
    data = data if "model" in data else {"model": data}
    _state(data["model"])
    return data


def _read(path: str, kind: str) -> Any:
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if kind == ".pkl":
            check_pickle(data, len(data))
            return ZooUnpickler(f, len(data)).load()
        if data[:4] == b"PK\x03\x04":
            _check_archive(f, data)
        else:  # before PyTorch 1.6: three pickles about the file, one of weights, one of storages
            for _ in range(5):
                check_pickle(data, len(data), TORCH_NAMES)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise Refused("what PyTorch does not read with weights_only=True") from e


def _run(path: str, kind: str) -> Any:
    if kind == ".pkl":
        with open(path, "rb") as f:
            return pickle.load(f, encoding="latin1")
    return torch.load(path, map_location="cpu", weights_only=False)


def _check_archive(file: IO[bytes], data: mmap.mmap) -> None:
    """Accept only what ``torch.save`` writes: one folder of unpacked files, each once, and nothing else.

    PyTorch's reader unpacks whatever it finds, as often as the table of contents names it.
    """
    closing = data[-22:]
    size = closing[12:16]
    if data[-42:-38] == b"PK\x06\x07":  # large archives store it elsewhere
        place = int.from_bytes(data[-34:-26], "little")
        size = data[place + 40 : place + 48]
    if closing[:4] != b"PK\x05\x06" or int.from_bytes(size, "little") > LONGEST_DIRECTORY:
        raise ValueError("it is cut short, or something follows its zip archive")
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda x: x.header_offset)
        names = [x.orig_filename for x in entries]
        ends = [*(x.header_offset for x in entries[1:]), archive.start_dir]
        ordinary = (
            not archive.comment
            and [x.header_offset for x in entries[:1]] == [0]
            and len({x.lower() for x in names}) == len(names)
            and len({x.partition("/")[0] for x in names}) == 1
            and all(
                re.fullmatch(r"(?!\.\.?/)[^/\\]+(/[\w.-]*\w)+", x) and x.isprintable()
                for x in names
            )
            and all(
                x.compress_type == zipfile.ZIP_STORED
                and x.file_size == x.compress_size <= end - x.header_offset - 30
                and not (x.flag_bits & 1 or stat.S_ISLNK(x.external_attr >> 16))
                for x, end in zip(entries, ends)
            )
        )
        if not ordinary:
            raise ValueError("its zip archive is none that torch.save writes")
        folder = names[0].partition("/")[0]
        if f"{folder}/constants.pkl" in names or f"{folder}/code/__torch__.py" in names:
            raise Refused("a TorchScript program")
        pickled = archive.read(f"{folder}/data.pkl")
        check_pickle(io.BytesIO(pickled), len(pickled), TORCH_NAMES)


def _of_a_zoo(data: Dict[str, Any]) -> Dict[str, Any]:
    def arrays(state: Dict[Any, Any]) -> Dict[Any, Any]:
        return {k: v.array if isinstance(v, Array) else v for k, v in state.items()}

    if "model" in data and "__author__" in data:
        return {
            "model": _state(arrays(data["model"])),
            "__author__": plain_name(data["__author__"]) if type(data["__author__"]) is str else "",
            "matching_heuristics": data.get("matching_heuristics") is True,
        }
    blobs = arrays(data.get("blobs", data))  # detectors have them, ImageNet models do not
    return {
        "model": _state(
            {
                name: x
                for name, x in blobs.items()
                if isinstance(x, np.ndarray) and not name.endswith("_momentum")
            }
        ),
        "__author__": "Caffe2",
        "matching_heuristics": True,
    }


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
