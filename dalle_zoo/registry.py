"""Typed registries: a name, a thing, and a helpful answer when the name is wrong."""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
Entry = TypeVar("Entry")


class UnknownNameError(KeyError, ValueError):
    """A name that is not there; the message holds the nearest right one and all others."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


def suggest(kind: str, name: str, known: Iterable[str]) -> str:
    """Sentence for a wrong name: what came, the nearest right name, and all names.

    Example:
        >>> suggest("mask", "colum", ["row", "column"])
        "unknown mask 'colum'. Did you mean 'column'? Known: column, row"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}"


class Registry(Mapping[str, T], Generic[T]):
    """Names and what they stand for, open to other distributions.

    Members join by the `register` decorator, or from outside through the entry-point group, which is read the
    first time that a look-up needs it.

    Args:
        kind: What the members are, for messages ("attention mask").
        group: Entry-point group of third parties; an entry is ``name = module:object``.
        base: Class that members must derive from; checked on registration, also of third parties.

    Example:
        >>> REG: Registry[type] = Registry("thing", group="example.things")
        >>> @REG.register("one")
        ... class One: ...
        >>> REG["one"] is One, list(REG)
        (True, ['one'])
    """

    def __init__(self, kind: str, *, group: str, base: type | None = None) -> None:
        self.kind, self.group, self.base = kind, group, base
        self._members: dict[str, T] = {}
        self._plugins: dict[str, importlib.metadata.EntryPoint] | None = None

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Decorator that adds a member; a taken name or a member of the wrong kind raises."""

        def add(entry: Entry) -> Entry:
            self._add(name, entry)  # type: ignore[arg-type]
            return entry

        return add

    def _add(self, name: str, entry: T) -> None:
        if name in self._members and self._members[name] is not entry:
            raise ValueError(f"{self.kind} {name!r} is taken by {self._members[name]!r}: choose another name")
        if self.base is not None and not (isinstance(entry, type) and issubclass(entry, self.base)):
            raise TypeError(f"{self.kind} {name!r} must derive from {self.base.__name__}, got {entry!r}")
        if not callable(entry):
            raise TypeError(f"{self.kind} {name!r} must be callable, got {entry!r}")
        self._members[name] = entry

    def _external(self) -> dict[str, importlib.metadata.EntryPoint]:
        if self._plugins is None:
            self._plugins = {}
            for point in importlib.metadata.entry_points(group=self.group):
                if point.name in self._members or point.name in self._plugins:
                    log.warning("%s %r of %s is ignored: the name is taken", self.kind, point.name, point.value)
                else:
                    self._plugins[point.name] = point
        return self._plugins

    def __getitem__(self, name: str) -> T:
        if name not in self._members:
            if name not in self._external():
                raise UnknownNameError(suggest(self.kind, str(name), self))
            self._add(name, self._external()[name].load())
        return self._members[name]

    def name_of(self, member: T) -> str:
        """Name of a member; `UnknownNameError` if it is none."""
        found = next((name for name in self if self[name] is member), None)
        if found is None:
            raise UnknownNameError(f"{member!r} is no registered {self.kind}: register it")
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._members or name in self._external()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._members, *self._external()}))

    def __len__(self) -> int:
        return len({*self._members, *self._external()})

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}: {', '.join(self)})"
