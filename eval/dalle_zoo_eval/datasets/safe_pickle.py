"""Pickles of plain data, read without running anything that they ask for.

A pickle is a program: it may import any function and call it. Here it may build containers, numbers and text alone,
by the table of instructions that also reads external weights (`dalle_zoo.convert.pickles`).
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
"""Larger files are refused; the captions of MS-COCO take a tenth of it."""

# The class numbers of AttnGAN's birds are scalars of numpy, which a pickle imports and calls; see `_stand_in`.
_SCALARS = {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"}
# dtype of numpy: format of struct
_FORMATS = {"i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "f4": "f", "f8": "d"}


class UnsafePickleError(DatasetError):
    """A pickle that holds more than plain data; nothing in it was run."""


def load_plain(path: Path) -> Any:
    """Reads a pickle of containers, numbers and text, of any protocol, also from Python 2.

    Text of Python 2 is taken as Latin-1. Scalars of numpy become Python's numbers.

    Args:
        path: The file.

    Returns:
        What it holds: lists, tuples, dicts, sets, str, bytes, numbers, booleans and None.

    Raises:
        UnsafePickleError: It asks for an import or a call, or is larger than `MAX_BYTES`.
        DatasetError: It is missing, no pickle, or damaged.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UnsafePickleError(f"it has {size} bytes, more than {MAX_BYTES}")
        return _Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path} is not opened: {error}") from None
    except Exception as error:  # the reader raises nearly anything on damaged bytes
        raise DatasetError(f"{path} is no pickle, or damaged ({type(error).__name__}: {str(error)[:200]})") from None


def _stand_in(module: str, name: str) -> Callable[..., Any]:
    """What takes the place of an import. Made anew each time, since a pickle can set attributes of what it gets."""
    if (module, name) == ("numpy", "dtype"):
        return lambda kind, *_: _Dtype(kind)
    if (module, name) in (("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")):
        return lambda dtype, value: dtype.number(value)
    raise UnsafePickleError(f"it must hold plain data alone, but asks for {module}.{name}")


class _Dtype:
    """Stands in for a dtype of numpy: integers and floats."""

    __slots__ = ("_format", "_order")

    def __init__(self, kind: str) -> None:
        if not isinstance(kind, str):  # a lookup would hash it, which takes years for some nested tuples
            raise UnsafePickleError("it has a dtype of numpy that is no text")
        self._format, self._order = _FORMATS[kind], "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Takes the byte order, the second of numpy's fields; single bytes have ``|``."""
        if not isinstance(state[1], str):
            raise UnsafePickleError("it has a byte order of numpy that is no text")
        self._order = {"<": "<", ">": ">", "|": "<"}[state[1]]

    def number(self, value: bytes | str) -> Any:
        """The number that some bytes encode; Python 2 wrote them as text."""
        data = value.encode("latin1") if isinstance(value, str) else value
        return struct.unpack(self._order + self._format, data)[0]


def _refusal(name: str) -> UnsafePickleError:
    return UnsafePickleError(f"it must hold plain data alone, but has the instruction {name}")


class _Unpickler(PlainUnpickler):
    """Few instructions and no imports."""

    dispatch = instructions(PLAIN | _SCALARS, _refusal)

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        return _stand_in(module, name)
