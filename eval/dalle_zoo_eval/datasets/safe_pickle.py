"""Reads pickles of plain data without running code.

A pickle is a program that may import and call any function. This reader only executes the instructions that build
containers, numbers and text, by the same table that reads external weights (`dalle_zoo.convert.pickles`).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle_zoo.convert.pickles import PLAIN, PlainUnpickler, instructions
from dalle_zoo_eval.datasets.base import DatasetError

MAX_BYTES = 256 * 2**20
"""Maximum size of a file, bytes; the captions of MS-COCO have a tenth of it."""

# The class numbers of AttnGAN's birds are NumPy scalars, which a pickle imports and calls; see `_stand_in`.
_SCALARS = {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"}
# Formats of struct by dtype of NumPy.
_FORMATS = {"i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "f4": "f", "f8": "d"}


class UnsafePickleError(DatasetError):
    """A pickle contains more than plain data; none of it was run.

    Example:
        >>> import pickle, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "names.pickle").write_bytes(pickle.dumps(print))
        ...     try:
        ...         load_plain(Path(folder, "names.pickle"))
        ...     except UnsafePickleError as error:
        ...         print(str(error).partition("opened: ")[2])
        it must hold only plain data, but requests builtins.print
    """


def load_plain(path: Path) -> Any:
    """Reads a pickle of containers, numbers and text, with any pickle protocol, including those of Python 2.

    Text of Python 2 is decoded as Latin-1. NumPy scalars become numbers of Python.

    Args:
        path: The file.

    Returns:
        Lists, tuples, dicts, sets, str, bytes, numbers, booleans and None.

    Raises:
        UnsafePickleError: The file requests an import or a call, or is larger than `MAX_BYTES`.
        DatasetError: The file is missing, is not a pickle, or is damaged.

    Example:
        >>> import pickle, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "names.pickle").write_bytes(pickle.dumps({"names": ["robin"], "count": 1}))
        ...     load_plain(Path(folder, "names.pickle"))
        {'names': ['robin'], 'count': 1}
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UnsafePickleError(f"it has {size} bytes, more than {MAX_BYTES}")
        return _Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path} is not opened: {error}") from None
    except Exception as error:  # the reader raises nearly anything on damaged bytes
        raise DatasetError(
            f"{path} is not a pickle, or is damaged ({type(error).__name__}: {str(error)[:200]})"
        ) from None


def _stand_in(module: str, name: str) -> Callable[..., Any]:
    """Returns a replacement for an import, a new one each time because a pickle can set its attributes."""
    if (module, name) == ("numpy", "dtype"):
        return lambda kind, *_: _Dtype(kind)
    if (module, name) in (("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")):
        return lambda dtype, value: dtype.number(value)
    raise UnsafePickleError(f"it must hold only plain data, but requests {module}.{name}")


class _Dtype:
    """Replaces a NumPy dtype of integers or floats."""

    __slots__ = ("_format", "_order")

    def __init__(self, kind: str) -> None:
        if not isinstance(kind, str):  # a lookup would hash it, which takes years for some nested tuples
            raise UnsafePickleError("it has a NumPy dtype that is not a string")
        self._format, self._order = _FORMATS[kind], "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Sets the byte order, the second field of NumPy; single bytes have ``|``."""
        if not isinstance(state[1], str):
            raise UnsafePickleError("it has a NumPy byte order that is not a string")
        self._order = {"<": "<", ">": ">", "|": "<"}[state[1]]

    def number(self, value: bytes | str) -> Any:
        """Returns the number that bytes encode; Python 2 wrote them as text."""
        data = value.encode("latin1") if isinstance(value, str) else value
        return struct.unpack(self._order + self._format, data)[0]


def _refusal(name: str) -> UnsafePickleError:
    return UnsafePickleError(f"it must hold only plain data, but has the instruction {name}")


class _Unpickler(PlainUnpickler):
    """Unpickler with few instructions and no imports."""

    dispatch = instructions(PLAIN | _SCALARS, _refusal)

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        return _stand_in(module, name)
