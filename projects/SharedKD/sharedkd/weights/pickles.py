"""Pickles of weights: measured before they are read, and read without running what they name."""

import math
import pickle
import pickletools
import re
from typing import IO, Any, Callable, Optional

import numpy as np

__all__ = ["Array", "Refused", "ZooUnpickler", "check_pickle", "plain_name"]

MOST_INSTRUCTIONS = 2_000_000  # each may build an object of some dozen bytes
_RESERVING = ("FRAME", "PUT", "BINPUT", "LONG_BINPUT")  # Python's unpickler makes that much room
MOST_TUPLES = 50_000  # nested to twice that depth, hashing one overflows the C stack


class Refused(Exception):
    """A file that asks for more than data.  ``asked`` says for what, in a few printable words."""

    def __init__(self, asked: str):
        super().__init__(asked)
        self.asked = asked


def plain_name(text: Any, longest: int = 80) -> str:
    """``text``, from a file, in one line of at most ``longest`` characters, all of them printable."""
    return ascii(" ".join(str(text).split(" "))[:longest])[1:-1]


def check_pickle(file: Any, size: int, names: Optional[re.Pattern] = None) -> None:
    """Scan a pickle's instructions to its end, without building anything.

    Args:
        file: binary; a read past its end returns what there is, without a buffer of the size asked
            for (``mmap`` and ``BytesIO`` do so).
        size: of the file in bytes.
        names: what ``module name`` may be; None: anything.

    Raises:
        Refused: it names something else.
        ValueError: it is broken, or would take far more memory than it has bytes.
    """
    tuples = 0
    for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        tuples += instruction.name.startswith("TUPLE")
        if count > MOST_INSTRUCTIONS or tuples > MOST_TUPLES:
            raise ValueError("it has too many instructions")
        if instruction.name in _RESERVING and argument > min(size, MOST_INSTRUCTIONS):
            raise ValueError("it claims more than it holds, or is cut short")
        if instruction.name == "GLOBAL" and names and not names.fullmatch(argument):
            raise Refused(plain_name(argument.replace(" ", ".")))


class ZooUnpickler(pickle.Unpickler):
    """Reads numbers, strings, containers and arrays of numbers, and calls nothing that the file names.

    A name in the file selects one of the functions below, or is refused.

    Args:
        file: binary, checked by :func:`check_pickle`.
        size: of the file in bytes; what is copied out of it may take twice as many.

    ``load`` raises :class:`Refused`, or any other exception if the file is broken.
    """

    def __init__(self, file: IO[bytes], size: int):
        super().__init__(file, encoding="latin1")  # as Python 2 wrote arrays
        self._left = 2 * size
        self._known = {
            "_codecs.encode": _Function(self._encode),  # how Python 3 writes bytes for Python 2
            "__builtin__.bytes": _Function(lambda: b""),
            "builtins.bytes": _Function(lambda: b""),
            "collections.OrderedDict": _Function(self._dict),
            "numpy.ndarray": "numpy.ndarray",
            "numpy.dtype": _Function(_DType),
        }
        for core in ("numpy.core", "numpy._core"):
            self._known[f"{core}.multiarray._reconstruct"] = _Function(self._reconstruct)
            self._known[f"{core}.multiarray.scalar"] = _Function(self._scalar)
            self._known[f"{core}.numeric._frombuffer"] = _Function(self._from_buffer)

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for ``module``.``name``; raise Refused if there is none."""
        if f"{module}.{name}" not in self._known:
            raise Refused(plain_name(f"{module}.{name}"))
        return self._known[f"{module}.{name}"]

    def array(self, kind: Any, raw: Any, shape: Any, order: str = "C") -> np.ndarray:
        """The array of ``kind`` and ``shape`` from its bytes, in this machine's byte order."""
        if type(raw) is list:
            raise Refused("an array of objects")
        if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("an array's shape is not a tuple of sizes")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if math.prod(shape) * kind.dtype.itemsize != len(raw):
            raise ValueError(f"an array of shape {plain_name(shape)} has {len(raw)} bytes")
        self._spend(len(raw))
        found = np.frombuffer(raw, kind.dtype).reshape(shape, order=order)  # type: ignore[call-overload]
        return found.astype(found.dtype.newbyteorder("="))

    def _spend(self, size: int) -> None:
        """Count the copied bytes: a file may name the same bytes again and again."""
        self._left -= size
        if self._left < 0:
            raise ValueError("it unpacks to more than it holds")

    def _encode(self, text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise ValueError("unusual bytes")
        self._spend(len(text))
        return text.encode("latin1")

    def _dict(self, pairs: Any = ()) -> "_Dict":
        self._spend(64 * len(pairs))
        return _Dict(pairs)

    def _reconstruct(self, kind: Any, shape: Any, code: Any) -> "Array":
        if kind != "numpy.ndarray":
            raise Refused("an array of a class of its own")
        return Array(self)

    def _scalar(self, kind: Any, raw: Any) -> Any:
        return self.array(kind, raw, ())[()]

    def _from_buffer(self, raw: Any, kind: Any, shape: Any, order: str) -> "Array":
        return Array(self, self.array(kind, raw, shape, order))


# The objects below have no attributes that a file could set.


class _Function:
    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _Dict(dict):
    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignore the attributes of a dictionary, such as PyTorch's ``_metadata``."""


class _DType:
    """A numpy dtype as a pickle builds it: first the name, then the byte order."""

    __slots__ = ("dtype",)

    def __init__(self, name: Any, align: Any = False, copy: Any = True):
        if not isinstance(name, str) or not re.fullmatch(r"[<>|=]?[biufc]\d{1,2}", name):
            raise Refused(f"an array of type {plain_name(name, 20)}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """Stands for a numpy array, which a file may refer to before its state is known.

    Attributes:
        array: None before that.
    """

    __slots__ = ("array", "_reader")

    def __init__(self, reader: ZooUnpickler, array: Optional[np.ndarray] = None):
        self._reader, self.array = reader, array

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, in_columns, raw = state
        self.array = self._reader.array(kind, raw, shape, "F" if in_columns else "C")
