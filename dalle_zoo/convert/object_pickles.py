"""Pickles of objects, read into inert placeholders.

Every object that is neither a container nor a number nor text becomes a `Placeholder` with its name and state. Nothing
is imported, so nothing can be called.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, BinaryIO

from dalle_zoo.convert.pickles import (
    PLAIN,
    Placeholder,
    PlainUnpickler,
    Reference,
    WeightFileError,
    instructions,
    set_item,
    shown,
)

MAX_INSTRUCTIONS = 2_000_000
"""Limit per pickle; a checkpoint of 12 billion parameters with its optimizer takes about 100,000. Elements that a call
copies count as well: with seven bytes per call a pickle can copy one list any number of times."""
TEXT_UNIT = 64
"""Number of characters or bytes of text that count as one element."""

MAX_LINE = 2**16
"""Limit of a line in bytes; only old protocols write text and numbers as lines."""
MAX_CLASS_NAME = 1_000
"""Limit of the name of a class or function in characters."""
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


def ordered_dict(pairs: Iterable[Any] = ()) -> OrderedDict[Any, Any]:
    """Builds an `OrderedDict` of pairs, as Python 2 and 3 pickle it."""
    made: OrderedDict[Any, Any] = OrderedDict()
    for pair in list(pairs):
        key, value = pair
        set_item(made, key, value)
    return made


def _bytes(text: str, encoding: str) -> bytes:
    """Builds bytes, as protocols below 3 write them."""
    if encoding not in ("latin1", "latin-1"):
        raise WeightFileError(f"it writes bytes in the encoding {shown(encoding)}, expected latin1")
    return text.encode("latin1")


BUILDERS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": ordered_dict,
    "_codecs.encode": _bytes,
}
"""Functions that replace those that a pickle calls; each checks its arguments."""


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
            raise WeightFileError("it names a class by something that is not a string")
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
            raise WeightFileError(f"it calls {type(reference).__name__}, which is not a class or function")
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
        raise WeightFileError(
            f"it is not a pickle, or is damaged ({type(error).__name__}: {str(error)[:200]})"
        ) from None
