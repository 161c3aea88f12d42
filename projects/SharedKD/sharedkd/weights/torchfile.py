"""What a PyTorch file claims, compared with what it holds, before PyTorch reads it.

``torch.load(weights_only=True)`` runs nothing, but takes the file's word for sizes, and PyTorch's
reader of zip archives unpacks whatever it finds.
"""

import io
import math
import mmap
import stat
import struct
import tarfile
import zipfile
from typing import IO, Any, Callable, Dict, Optional, Tuple, Union

from .unpickler import Refused, Unpickler, plain_dict, plain_name

__all__ = ["check_torch_file"]

LONGEST_DIRECTORY = 2**23  # bytes of a zip archive's table of contents: about 80,000 entries

#: Bytes of an element of PyTorch's typed storages.
_STORAGES = dict(
    Double=8, Float=4, Half=2, BFloat16=2, Long=8, Int=4, Short=2, Char=1, Byte=1, Bool=1,
    ComplexFloat=8, ComplexDouble=16, Untyped=1,
)  # fmt: skip
_DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
).split()


MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # of torch.serialization


class _Tensor:
    """Stands for a tensor whose place in its storage has been checked."""


class TorchChecker(Unpickler):
    """Reads the pickle of a PyTorch file for what it claims, and builds none of its tensors.

    Args:
        file, size: see :class:`Unpickler`.
        storage_size: key -> the bytes that the file holds for this storage; None: unknown as yet.

    Attributes:
        storages: key -> the bytes that the pickle claims for it.
    """

    def __init__(
        self,
        file: Union[io.BytesIO, mmap.mmap],
        size: int,
        storage_size: Callable[[str], Optional[int]] = lambda key: None,
    ):
        super().__init__(file, size)
        self.storage_size = storage_size
        self.kinds: Dict[str, str] = {}
        self.storages: Dict[str, int] = {}

    def globals(self) -> Dict[str, Optional[Callable]]:
        return {
            **super().globals(),
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_parameter_with_state": _parameter,
            "torch.Size": tuple,
            "torch.device": _device,
            "collections.Counter": plain_dict,
            "torch.storage.UntypedStorage": None,
            **{f"torch.{name}Storage": None for name in _STORAGES},
            **{f"torch.{name}": None for name in _DTYPES},
        }

    def build(self, instance: Any, state: Any) -> None:
        super().build(instance, state)
        if type(state) is not dict or set(state) - {"_metadata"}:
            raise Refused("attributes for a dictionary")

    def persistent_load(self, pid: Any) -> Tuple[int, int]:
        if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage":
            return super().persistent_load(pid)
        _, kind, key, _, count, *view = pid
        name = getattr(kind, "name", "").rpartition(".")[2].removesuffix("Storage")
        width = _STORAGES[name]
        if type(key) is not str or type(count) is not int or count < 0 or any(view):
            raise ValueError("an unusual storage")
        held = self.storage_size(key)
        if held not in (None, count * width) or self.kinds.setdefault(key, name) != name:
            raise ValueError(f"storage {plain_name(key)} is not of the size that it claims")
        if self.storages.setdefault(key, count * width) != count * width:
            raise ValueError(f"storage {plain_name(key)} has two sizes")
        return count, width

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
        count, _ = storage
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("a tensor's shape is not made of sizes")
        elements = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides))
        if elements > count or (elements and last >= count) or offset > count:
            raise ValueError(
                f"a tensor of shape {plain_name(tuple(shape))} lies in {count} elements"
            )
        return _Tensor()


def _parameter(data: Any, *rest: Any) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise ValueError("a parameter that is no tensor")
    return data


def _device(*arguments: Any) -> str:
    return "device"


def check_torch_file(file: IO[bytes], data: mmap.mmap) -> None:
    """Check a file of either of PyTorch's formats.

    Args:
        file, data: the same file, open and mapped.

    Raises:
        Refused: it asks for more than tensors, numbers, strings and containers.
        ValueError: it would take more memory than it has bytes, or is not such a file.
    """
    if data[:4] == b"PK\x03\x04":
        _check_zip(file, data)
    else:
        _check_legacy(data)


def _check_zip(file: IO[bytes], data: mmap.mmap) -> None:
    """What ``torch.save`` writes: one folder of plain, unpacked files, each once."""
    end = struct.unpack("<4s4H2LH", data[-22:])
    if end[0] != b"PK\x05\x06" or end[-1]:  # two readers could find different archives in it
        raise ValueError("a zip archive with something at its end")
    if _directory_size(data, end) > LONGEST_DIRECTORY:
        raise ValueError("a zip archive with too many entries")
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda x: x.header_offset)
        for entry in entries:
            parts = entry.orig_filename.split("/")
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise ValueError("a zip archive with packed entries, which PyTorch does not write")
            if stat.S_ISLNK(entry.external_attr >> 16) or entry.is_dir() or entry.flag_bits & 1:
                raise ValueError("a zip archive with links, folders or encrypted entries")
            if len(parts) < 2 or {"", ".", ".."} & set(parts) or not _harmless(entry.orig_filename):
                raise ValueError(f"a zip archive with a file {plain_name(entry.orig_filename)}")
        if not entries or entries[0].header_offset:
            raise ValueError("a zip archive with something before it")
        names = [entry.orig_filename for entry in entries]
        folders = {name.partition("/")[0] for name in names}
        if len({name.lower() for name in names}) < len(names) or len(folders) != 1:
            raise ValueError("a zip archive with two files of one name, or several folders")
        starts = [entry.header_offset for entry in entries]
        for entry, following in zip(entries, [*starts[1:], archive.start_dir]):
            if entry.header_offset + 30 + entry.file_size > following:
                raise ValueError("a zip archive whose files overlap")
        folder = folders.pop()
        if any(f"{folder}/{name}" in names for name in ("constants.pkl", "code/__torch__.py")):
            raise Refused("a TorchScript program")
        sizes = {entry.orig_filename: entry.file_size for entry in entries}
        pickled = archive.read(f"{folder}/data.pkl")
        checker = TorchChecker(
            io.BytesIO(pickled), len(data), lambda key: sizes.get(f"{folder}/data/{key}", -1)
        )
        checker.load()


def _harmless(name: str) -> bool:
    return name.isprintable() and not set(name) & set("\\:")


def _directory_size(data: mmap.mmap, end: tuple) -> int:
    locator = data[-42:-22]
    if locator[:4] != b"PK\x06\x07":
        return end[5]
    (place,) = struct.unpack("<Q", locator[8:16])
    return struct.unpack("<Q", data[place + 40 : place + 48])[0]


def _check_legacy(data: mmap.mmap) -> None:
    """What ``torch.save`` wrote before PyTorch 1.6: five pickles, then the storages."""
    try:
        tarfile.open(fileobj=io.BytesIO(data[:4096]), mode="r:").close()
    except tarfile.TarError:
        pass
    else:
        raise Refused("PyTorch's format of 2016, a tar archive")
    for expected in (MAGIC_NUMBER, 1001):
        if Unpickler(data, len(data)).load() != expected:
            raise ValueError("it is not a file of PyTorch")
    Unpickler(data, len(data)).load()  # the system that wrote it
    checker = TorchChecker(data, len(data))
    checker.load()
    keys = Unpickler(data, len(data)).load()
    if type(keys) is not list or sorted(keys) != sorted(checker.storages):
        raise ValueError("its list of storages is not that of its tensors")
    for key in keys:
        size = checker.storages[key]
        width = _STORAGES[checker.kinds[key]]
        (count,) = struct.unpack("<q", data.read(8))
        if count * width != size or data.tell() + size > len(data):
            raise ValueError(f"storage {plain_name(key)} is not of the size that it claims")
        data.seek(size, 1)
