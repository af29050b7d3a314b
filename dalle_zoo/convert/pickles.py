"""Reads pickles without running the code they ask for.

A pickle is a program: it may import and call any function. Here it may build containers, numbers and text; every other
object becomes a `Placeholder` with its name and state. Nothing is imported, so nothing can be called.
The reader is Python's implementation in Python, not the one in C: its instructions are a table that can be restricted,
and a file of ten bytes cannot exhaust the memory by giving a value the number four billion.
"""

from __future__ import annotations

import pickle
import pickletools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, BinaryIO

MAX_INSTRUCTIONS = 2_000_000
"""Limit per pickle; a checkpoint of 12 billion parameters with its optimizer takes about 100,000. Elements that a call
copies count as well: with seven bytes per call a pickle can copy one list any number of times."""
TEXT_UNIT = 64
"""Number of characters or bytes of text that count as one element."""

MAX_LINE = 2**16
"""Limit of a line in bytes; only old protocols write text and numbers as lines."""
MAX_CLASS_NAME = 1_000
"""Limit of the name of a class or function in characters."""
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
_OBJECTS = {"GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"}

_STANDARD_LIBRARY = sys.stdlib_module_names | {"__builtin__", "copy_reg", "exceptions", "commands"}  # also Python 2's
# Names of the standard library that occur in weight files, mostly types of hyper-parameters. Others are an attack.
_HARMLESS = {
    "__builtin__": "bool bytes complex dict float frozenset int list long object set slice str tuple unicode",
    "builtins": "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple",
    "argparse": "Namespace",
    "collections": "Counter OrderedDict defaultdict deque",
    "datetime": "date datetime time timedelta timezone",
    "enum": "Enum IntEnum",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "types": "SimpleNamespace",
    "typing": "Any Dict List Optional Tuple Union",
}


class WeightFileError(ValueError):
    """A weight file is damaged, or does more than weights need; no code of it was run."""


class UnrelatedFileError(WeightFileError):
    """A file is something other than weights; such files are allowed next to weights."""


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


def ordered_dict(pairs: Iterable[Any] = ()) -> OrderedDict[Any, Any]:
    """Builds an `OrderedDict` of pairs, as Python 2 and 3 pickle it."""
    made: OrderedDict[Any, Any] = OrderedDict()
    for pair in list(pairs):
        key, value = pair
        _set(made, key, value)
    return made


def _bytes(text: str, encoding: str) -> bytes:
    """Builds bytes, as protocols below 3 write them."""
    if encoding not in ("latin1", "latin-1"):
        raise WeightFileError(f"it writes bytes in the encoding {encoding!r}, expected latin1")
    return text.encode("latin1")


BUILDERS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": ordered_dict,
    "_codecs.encode": _bytes,
}
"""Functions that replace those that a pickle calls; each checks its arguments."""


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
                _set(target, key, value)

    def _dict(self) -> None:
        items = self.pop_mark()
        made: dict[Any, Any] = {}
        for key, value in _pairs(items):
            _set(made, key, value)
        self.stack.append(made)

    def _add_items(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise WeightFileError(f"it adds to {type(self.stack[-1]).__name__} as if it were a set")
        self.stack[-1].update(map(_key, items))

    def _frozenset(self) -> None:
        items = self.pop_mark()
        self.stack.append(frozenset(map(_key, items)))


class ObjectUnpickler(PlainUnpickler):
    """Reads one pickle from a file into containers, numbers, text, `Reference` and `Placeholder`.

    Args:
        file: File to read from. Its reads must be limited to its size, see `Limited`.
        builders: Functions by the names they replace. Defaults to `BUILDERS`.
        persistent: Returns the object for a persistent identifier. Defaults to None: such pickles are refused.
    """

    def __init__(
        self,
        file: Any,
        builders: Mapping[str, Callable[..., Any]] = BUILDERS,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(file, encoding="latin1")
        self._builders, self._persistent = builders, persistent
        self._left = MAX_INSTRUCTIONS
        self.names: set[str] = set()
        """Full names of the classes and functions that the pickle asks for."""

    def find_class(self, module: str, name: str) -> Reference:
        """Returns the name alone. Names of the standard library are refused, except for a few types."""
        full = f"{module}.{name}"
        if not (isinstance(module, str) and isinstance(name, str)):
            raise WeightFileError("it names a class by something that is no text")
        if len(full) > MAX_CLASS_NAME:
            raise WeightFileError(f"it names a class by more than {MAX_CLASS_NAME} characters")
        self._count(_worth(full))
        known = full in self._builders or name in _HARMLESS.get(module, "").split()
        if module.split(".")[0] in _STANDARD_LIBRARY and not known:
            raise WeightFileError(f"it asks for {full[:100]!r}, which weights have no use for: it may be an attack")
        self.names.add(full)
        return Reference(full)

    def persistent_load(self, pid: Any) -> Any:
        """Returns the caller's object for an identifier."""
        if self._persistent is None:
            raise WeightFileError("it refers to data outside the pickle")
        return self._persistent(pid)

    # The methods below replace instructions that would call or change an object.

    def _count(self, number: int = 1) -> None:
        self._left -= number
        if self._left < 0:
            raise WeightFileError(f"it has more than {MAX_INSTRUCTIONS} instructions, or elements that they copy")

    def _make(self, reference: Any, arguments: Any) -> Any:
        if not isinstance(reference, Reference):
            raise WeightFileError(f"it calls {type(reference).__name__}, which is no class or function")
        if not isinstance(arguments, tuple):
            raise WeightFileError(f"it calls {reference.name} with {type(arguments).__name__} in place of arguments")
        if reference.name in self._builders:
            self._count(sum(map(_worth, arguments)))
            return self._builders[reference.name](*arguments)
        return Placeholder(reference.name, arguments)

    def _reduce(self) -> None:
        arguments, reference = self.stack.pop(), self.stack.pop()
        self.stack.append(self._make(reference, arguments))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Placeholder):
            target.state = state
        elif not isinstance(target, dict):  # the state of an OrderedDict of torch, versions of modules, is not needed
            raise WeightFileError(f"it sets the state of {type(target).__name__}, which has none")


def _worth(argument: Any) -> int:
    """Returns how many elements a copy counts as."""
    if isinstance(argument, str | bytes):
        return len(argument) // TEXT_UNIT
    return len(argument) if isinstance(argument, Sized) else 0


def _pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    if len(items) % 2:
        raise WeightFileError("it fills a mapping with a key that has no value")
    return zip(items[::2], items[1::2], strict=True)


def _set(target: Any, key: Any, value: Any) -> None:
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


def _counted(run: Callable[[Any], None]) -> Callable[[Any], None]:
    def counted(unpickler: ObjectUnpickler) -> None:
        unpickler._count()
        run(unpickler)

    return counted


ObjectUnpickler.dispatch = {
    code: _counted(run)
    for code, run in instructions(
        PLAIN | _OBJECTS,
        lambda name: WeightFileError(f"it has the instruction {name}, which weights have no use for"),
        {
            "REDUCE": ObjectUnpickler._reduce,
            "NEWOBJ": ObjectUnpickler._reduce,
            "BUILD": ObjectUnpickler._build,
        },
    ).items()
}


class Limited:
    """A file that raises an error when more than a number of bytes are read.

    Args:
        file: Binary file, read from its current position.
        num_bytes: Number of bytes that may be read.
    """

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file, self._left = file, num_bytes

    def read(self, size: int = -1) -> bytes:
        """Returns exactly the next `size` bytes."""
        if not 0 <= size <= self._left:
            raise WeightFileError(f"it asks for {size} bytes where {self._left} are left: it is truncated or damaged")
        data = self._file.read(size)
        self._left -= len(data)
        if len(data) != size:
            raise WeightFileError("it ends too early: it is truncated")
        return data

    def readline(self) -> bytes:
        """Returns the next line."""
        data = self._file.readline(min(self._left, MAX_LINE))
        self._left -= len(data)
        if not data.endswith(b"\n"):
            raise WeightFileError(f"it has a line without an end, or of more than {MAX_LINE} bytes")
        return data


def load_objects(
    file: BinaryIO,
    num_bytes: int,
    builders: Mapping[str, Callable[..., Any]] = BUILDERS,
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, frozenset[str]]:
    """Reads one pickle; the position of the file is then after it.

    Args:
        file: Binary file.
        num_bytes: Maximum size of the pickle in bytes.
        builders: As in `ObjectUnpickler`.
        persistent: As in `ObjectUnpickler`.

    Returns:
        The content, and the names of the classes and functions that the pickle asks for.

    Raises:
        WeightFileError: The pickle does more than weights need, or is damaged. The message has no file name.
    """
    unpickler = ObjectUnpickler(Limited(file, num_bytes), builders, persistent)
    try:
        return unpickler.load(), frozenset(unpickler.names)
    except WeightFileError:
        raise
    except Exception as error:  # the reader raises many kinds of errors on damaged bytes
        raise WeightFileError(f"it is no pickle, or damaged ({type(error).__name__}: {str(error)[:200]})") from None
