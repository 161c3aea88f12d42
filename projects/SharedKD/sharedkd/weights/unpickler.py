"""Pickles read as data: numbers, strings, containers and arrays, and nothing that they ask to be called.

Python's own unpickler calls whatever a file names.  The one here follows the same instructions, but
a name in the file only ever selects one of a few functions of ours, and what these build is paid
for out of a budget of twice the bytes that the file has.
"""

import io
import math
import mmap
import pickle
import re
import struct
import sys
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import numpy as np

__all__ = ["ArrayUnpickler", "Refused", "Unpickler", "plain_dict", "plain_name"]

#: Far more than a checkpoint takes; each may build an object of a few dozen bytes.
MOST_INSTRUCTIONS = 2_000_000

_ADMITTED = """
    PROTO FRAME STOP MARK POP POP_MARK DUP
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS
    EMPTY_DICT DICT SETITEM SETITEMS
    GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
    GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
""".split()

_NAMES = {
    getattr(pickle, name)[0]: name
    for name in dir(pickle)
    if name.isupper()
    and isinstance(getattr(pickle, name), bytes)
    and len(getattr(pickle, name)) == 1
}


class Refused(Exception):
    """A file asks for more than data.  ``asked`` says for what, in a few printable words."""

    def __init__(self, asked: str):
        super().__init__(asked)
        self.asked = asked


def plain_name(text: Any, longest: int = 80) -> str:
    """``text``, a name from a file, cut to ``longest`` characters and fit for a terminal or log."""
    return ascii(str(text)[:longest])[1:-1]


class Global:
    """What stands for a name in the file: it can be called only by the unpickler, if at all."""

    def __init__(self, name: str, function: Optional[Callable] = None):
        self.name, self.function = name, function


class Unpickler(pickle._Unpickler):  # C's sizes its memo by whatever number the file names
    """Plain values and containers; subclasses add to :meth:`globals`, :meth:`build` and ``persistent_load``.

    Args:
        file: binary; a read past its end returns what there is, without a buffer of the size asked for
            (``mmap`` and ``BytesIO`` do so).
        size: of the file; it may build twice as many bytes.

    ``load`` raises :class:`Refused`, or any other exception if the file is broken.
    """

    # What Python's unpickler has and the types of its library leave out.
    stack: List[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], List[Any]]
    read: Callable[[int], bytes]

    def __init__(self, file: Union[io.BytesIO, mmap.mmap], size: int):
        super().__init__(file, encoding="latin1")  # as Python 2 wrote arrays
        self.budget = 2 * size  # bytes, and the array made of them
        self.known = {name: Global(name, function) for name, function in self.globals().items()}
        self.dispatch = _Instructions(type(self))  # type: ignore[misc, assignment]

    def globals(self) -> Dict[str, Optional[Callable]]:
        """module.name -> what is called in its place; None: it is named only, never called."""
        return {
            "_codecs.encode": self._encode,  # how Python 3 writes bytes for Python 2
            "__builtin__.bytes": bytes_of_nothing,
            "builtins.bytes": bytes_of_nothing,
            "collections.OrderedDict": plain_dict,
        }

    def build(self, instance: Any, state: Any) -> None:
        """Give ``instance`` its ``state``; a dictionary's attributes are of no interest.

        Raises:
            Refused: ``instance`` is no dictionary.
        """
        if type(instance) is not dict:
            raise Refused(f"a state for an object of type {type(instance).__name__}")

    def spend(self, size: int) -> None:
        """Take ``size`` bytes, which are about to be built, from the budget.

        Raises:
            ValueError: more is built than the file holds.
        """
        self.budget -= size
        if self.budget < 0:
            raise ValueError("it unpacks to more than it holds")

    def find_class(self, module: str, name: str) -> Global:
        """What stands for ``module``.``name``.

        Raises:
            Refused: it is not among :meth:`globals`.
        """
        full = f"{module}.{name}"
        if full not in self.known:
            raise Refused(plain_name(full))
        return self.known[full]

    def persistent_load(self, pid: Any) -> Any:
        """What stands for the object that lies outside of the pickle under ``pid``.

        Raises:
            Refused: always; only the storages of PyTorch's files, in a subclass, are let in.
        """
        raise Refused("an object kept outside of the file")

    def _encode(self, text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
            raise ValueError("unusual bytes")
        self.spend(len(text))
        return text.encode("latin1")

    # The instructions that touch objects; all others come from Python's library.

    def load_reduce(self) -> None:
        arguments, callee = self.stack.pop(), self.stack[-1]
        if not isinstance(callee, Global) or callee.function is None:
            raise Refused(f"a call of {getattr(callee, 'name', type(callee).__name__)}")
        if type(arguments) is not tuple:
            raise ValueError("a call without arguments")
        self.stack[-1] = callee.function(*arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        self.build(self.stack[-1], state)

    def load_append(self) -> None:
        value = self.stack.pop()
        _only(self.stack[-1], list).append(value)

    def load_appends(self) -> None:
        values = self.pop_mark()
        _only(self.stack[-1], list).extend(values)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], items)

    def load_bytearray8(self) -> None:  # Python's makes room before it reads
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(min(size, sys.maxsize))))

    def load_dict(self) -> None:
        items = self.pop_mark()  # which also puts back the stack that `append` fills
        self.append(_set_items({}, items))


class _Instructions:
    """The table of :class:`Unpickler`, which counts and refuses."""

    def __init__(self, unpickler: type):
        known = pickle._Unpickler.dispatch
        self.functions = {
            code: getattr(unpickler, known[code].__name__)
            for code, name in _NAMES.items()
            if name in _ADMITTED
        }
        self.left = MOST_INSTRUCTIONS

    def __getitem__(self, code: int) -> Callable:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has more than {MOST_INSTRUCTIONS:,} instructions")
        if code not in _NAMES:
            raise ValueError("it is not a pickle")
        if code not in self.functions:
            raise Refused(f"the pickle instruction {_NAMES[code]}")
        return self.functions[code]


def _only(target: Any, kind: type) -> Any:
    if type(target) is not kind:
        raise Refused(f"to fill an object of type {type(target).__name__}")
    return target


def _set_items(target: Any, items: list) -> dict:
    _only(target, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        # The hash of a tuple goes as deep as the tuple does, on C's stack.
        if type(key) not in (str, bytes, int, float, bool, type(None)):
            raise ValueError(f"a dictionary's key is a {type(key).__name__}")
        target[key] = value
    return target


def plain_dict(pairs: Any = ()) -> dict:
    """What ``dict`` of ``pairs`` is to a pickle, with keys checked as those of any other."""
    if type(pairs) is dict:
        return dict(pairs)
    return _set_items({}, [x for key, value in pairs for x in (key, value)])


def bytes_of_nothing() -> bytes:
    return b""


class _DType:
    """A numpy dtype on its way: first the name, then the byte order."""

    def __init__(self, name: str, align: Any = False, copy: Any = True):
        if not isinstance(name, str) or not re.fullmatch(r"[<>|=]?[biufc]\d{1,2}", name):
            raise Refused(f"an array of type {plain_name(name, 20)}")
        self.dtype = np.dtype(name)


class ArrayUnpickler(Unpickler):
    """Numpy arrays and scalars of numbers as well, written by numpy 1 or 2, Python 2 or 3.

    Args:
        file, size: see :class:`Unpickler`.
    """

    def __init__(self, file: Union[io.BytesIO, mmap.mmap], size: int):
        super().__init__(file, size)
        self._blank: Dict[int, np.ndarray] = {}

    def globals(self) -> Dict[str, Optional[Callable]]:
        found = {**super().globals(), "numpy.ndarray": None, "numpy.dtype": _DType}
        for core in ("core", "_core"):
            found[f"numpy.{core}.multiarray._reconstruct"] = self._reconstruct
            found[f"numpy.{core}.multiarray.scalar"] = self._scalar
            found[f"numpy.{core}.numeric._frombuffer"] = self._from_buffer
        return found

    def build(self, instance: Any, state: Any) -> None:
        if isinstance(instance, _DType):
            _, order, *rest = state
            if any(x is not None for x in rest[:3]):
                raise Refused("an array of records")
            if order not in ("<", ">", "|", "="):
                raise ValueError("unknown byte order")
            instance.dtype = instance.dtype.newbyteorder(order)
        elif id(instance) in self._blank:
            _, shape, kind, in_columns, raw = state
            layout: Any = "F" if in_columns else "C"
            array = self._array(_only(kind, _DType).dtype, raw, shape, layout)
            # In place, because the file may refer to it before its state is known.
            instance.__setstate__(
                (1, array.shape, array.dtype, layout == "F", array.tobytes(layout))
            )
            del self._blank[id(instance)]
        else:
            super().build(instance, state)

    def _array(self, dtype: np.dtype, raw: Any, shape: Tuple[int, ...], order: str) -> np.ndarray:
        if type(raw) is list:
            raise Refused("an array of objects")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("an array's shape is not a tuple of sizes")
        if math.prod(shape) * dtype.itemsize != len(raw):
            raise ValueError(f"an array of shape {plain_name(shape)} has {len(raw)} bytes")
        self.spend(len(raw))
        return np.frombuffer(raw, dtype).reshape(shape, order=order)

    def _reconstruct(self, kind: Global, shape: Any, code: Any) -> np.ndarray:
        if getattr(kind, "name", None) != "numpy.ndarray":
            raise Refused("an array of a class of its own")
        array = np.empty(0, np.int8)
        self._blank[id(array)] = array
        return array

    def _scalar(self, kind: _DType, raw: Any) -> Any:
        return self._array(_only(kind, _DType).dtype, raw, (), "C")[()]

    def _from_buffer(self, raw: Any, kind: _DType, shape: Any, order: str) -> np.ndarray:
        return self._array(_only(kind, _DType).dtype, raw, shape, order).copy(order="K")
