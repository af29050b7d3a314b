"""Pickles of containers, numbers and text, read without running the code they ask for.

A pickle is a program: it may import and call any function. `PlainUnpickler` runs only the instructions of a table, and
these fill only containers, with only plain keys. `dalle_zoo.convert.object_pickles` adds placeholders for objects.
The reader is Python's implementation in Python, not the one in C: its instructions are a table that can be restricted,
and a file of ten bytes cannot exhaust the memory by giving a value the number four billion.

What was read may still be an attack. A list can hold another one twice, which holds a third one twice, and so on:
printing, comparing or hashing 40 of these takes years. Messages therefore print such values with `shown`.
"""

from __future__ import annotations

import pickle
import pickletools
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MAX_SHOWN = 200
"""Limit of the characters of a value in a message."""
MAX_KEY_BITS, MAX_KEY_PARTS = 64, 16
"""Limits of numbers and tuples that are keys: every lookup hashes them completely."""

_PLAIN = """
    PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT
    BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES
    SHORT_BINBYTES BINBYTES8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT
    SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
"""
PLAIN = frozenset(_PLAIN.split())
"""Instructions that build containers, numbers and text."""


class WeightFileError(ValueError):
    """A weight file is damaged, or does more than weights need; no code of it was run.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from dalle_zoo.convert import WeightFileError, open_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"weight": torch.ones(2, 3)}, path := Path(folder, "net.pt"))
        ...     _ = path.write_bytes(path.read_bytes()[:-100])
        ...     try:
        ...         open_checkpoint(path)
        ...     except WeightFileError as error:
        ...         print(str(error).partition("opened: ")[2])
        its archive has no directory, or one that is too long: it is truncated or damaged
    """


class UnrelatedFileError(WeightFileError):
    """A file is something other than weights; such files are allowed next to weights.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from dalle_zoo.convert import UnrelatedFileError, open_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "notes.txt").write_text("no weights")
        ...     try:
        ...         open_checkpoint(Path(folder, "notes.txt"))
        ...     except UnrelatedFileError as error:
        ...         print(str(error).partition(": ")[2])
        it is not a file of torch, safetensors or Flax
    """


class Reference:
    """Name of a class or function in a pickle; a call of it makes a `Placeholder`.

    Args:
        name: Full name, such as "dall_e.encoder.Encoder".
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"Reference({self.name})"


class Placeholder:
    """Stands in for an object whose class is not imported.

    Args:
        name: Full name of the class, or of the function that would have made the object.
        arguments: Arguments of the call.
    """

    __slots__ = ("arguments", "items", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None
        """State that the object would have been given, usually its ``__dict__``."""
        self.items: list[Any] = []
        """Elements or key-value pairs if the class derives from list or dict."""

    @property
    def attributes(self) -> dict[Any, Any]:
        """The ``__dict__``; empty if the state is not a dict."""
        return self.state if isinstance(self.state, dict) else {}

    def __repr__(self) -> str:
        return f"Placeholder({self.name})"


class _Shown(reprlib.Repr):
    """Prints the beginning of a value, whatever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 100, 100

    def repr_int(self, value: int, level: int) -> str:
        """Returns an integer: Python refuses to print one of thousands of digits."""
        return repr(value) if abs(value).bit_length() <= 128 else f"an integer of {value.bit_length()} bits"

    def repr_bytes(self, value: bytes, level: int) -> str:
        """Returns the beginning of bytes."""
        return repr(value[: self.maxstring]) + ("..." if len(value) > self.maxstring else "")


def shown(value: Any) -> str:
    """Returns the text of a value of a pickle for a message: the first parts of the first levels, whatever its size.

    Example:
        >>> shown([1, [2, [3, [4]]]]), shown(2**200)
        ('[1, [2, [3, [...]]]]', 'an integer of 201 bits')
    """
    text = _Shown().repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


class PlainUnpickler(pickle._Unpickler):
    """Fills only containers, with only plain keys. ``dispatch`` is the table of allowed instructions."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list | Placeholder):
            raise WeightFileError(f"it appends to {type(target).__name__}")
        (target if isinstance(target, list) else target.items).extend(items)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in _pairs(items):
            if isinstance(target, Placeholder):
                target.items.append((key, value))
            else:
                set_item(target, key, value)

    def _dict(self) -> None:
        items = self.pop_mark()
        made: dict[Any, Any] = {}
        for key, value in _pairs(items):
            set_item(made, key, value)
        self.stack.append(made)

    def _add_items(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise WeightFileError(f"it adds to {type(self.stack[-1]).__name__} as if it were a set")
        self.stack[-1].update(map(_key, items))

    def _frozenset(self) -> None:
        items = self.pop_mark()
        self.stack.append(frozenset(map(_key, items)))


def _pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    if len(items) % 2:
        raise WeightFileError("it fills a mapping with a key that has no value")
    return zip(items[::2], items[1::2], strict=True)


def set_item(target: Any, key: Any, value: Any) -> None:
    """Sets an item of a dict, or raises `WeightFileError` if it is no dict or the key is not plain."""
    if not isinstance(target, dict):
        raise WeightFileError(f"it sets an item of {type(target).__name__}")
    target[_key(key)] = value


def _key(key: Any) -> Any:
    """Returns a key if it is plain: hashing deeply nested tuples would overflow the stack."""
    if isinstance(key, tuple) and len(key) > MAX_KEY_PARTS:
        raise WeightFileError(f"it has a key of {len(key)} parts, more than {MAX_KEY_PARTS}")
    if isinstance(key, tuple) and all(_is_plain(part) for part in key):
        return key
    if _is_plain(key):
        return key
    if isinstance(key, Placeholder | Reference):  # members of an enum; hashed by identity
        return key
    raise WeightFileError(f"it has a key that is neither text nor number: {type(key).__name__}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, int) and value.bit_length() > MAX_KEY_BITS:
        raise WeightFileError(f"it has a number of {value.bit_length()} bits as a key, more than {MAX_KEY_BITS}")
    return value is None or isinstance(value, str | bytes | int | float)


_FILLING: dict[str, Callable[[Any], None]] = {
    "APPEND": PlainUnpickler._append,
    "APPENDS": PlainUnpickler._appends,
    "SETITEM": PlainUnpickler._set_item,
    "SETITEMS": PlainUnpickler._set_items,
    "DICT": PlainUnpickler._dict,
    "ADDITEMS": PlainUnpickler._add_items,
    "FROZENSET": PlainUnpickler._frozenset,
}


def instructions(
    allowed: Iterable[str], refuse: Callable[[str], Exception], own: Mapping[str, Callable[[Any], None]] | None = None
) -> dict[int, Callable[[Any], None]]:
    """Returns the instruction table of a subclass of `PlainUnpickler`: functions by instruction byte.

    Args:
        allowed: Names of the instructions that run as in Python or in `PlainUnpickler`.
        refuse: Returns the error for the name of any other instruction.
        own: Functions that replace instructions. Defaults to none.
    """
    python = pickle._Unpickler.dispatch
    names, own = set(allowed), {**_FILLING, **(own or {})}

    def refusal(name: str) -> Callable[[Any], None]:
        def run(unpickler: Any) -> None:
            raise refuse(name)

        return run

    return {
        ord(o.code): (own.get(o.name) or python[ord(o.code)]) if o.name in names else refusal(o.name)
        for o in pickletools.opcodes
    }
