"""Typed registries of named classes and functions, with suggestions for misspelled names."""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
Entry = TypeVar("Entry")
Spec = TypeVar("Spec")


class UnknownNameError(KeyError, ValueError):
    """A name is not known. The message suggests the closest known name and lists all of them.

    Example:
        >>> REG: Registry[type] = Registry("mask", group="example.things")
        >>> _ = REG.register("column")(int)
        >>> REG["colum"]
        Traceback (most recent call last):
        dalle_zoo.registry.UnknownNameError: unknown mask 'colum'. Did you mean 'column'? Known: column
    """

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class PluginError(ImportError):
    """A member of another distribution cannot be loaded. The message names it and the reason."""


def suggest(kind: str, name: object, known: Iterable[str]) -> str:
    """Returns an error message for an unknown name, with the closest known name and a list of all of them.

    The closest name is one that begins with the unknown name, or else one of similar spelling.

    Args:
        kind: Kind of object that the name denotes ("mask").
        name: The unknown name.
        known: All known names.

    Example:
        >>> suggest("mask", "colum", ["row", "column"])
        "unknown mask 'colum'. Did you mean 'column'? Known: column, row"
    """
    names = sorted(known)
    longer = [known for known in names if len(str(name)) > 2 and known.startswith(str(name))]
    near = longer[:1] or difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}"


class Registry(Mapping[str, T], Generic[T]):
    """A mapping of names to classes or functions, which other distributions can extend.

    Members are added with the `register` decorator, or by other distributions through an entry-point group. Entry
    points are read when a lookup first needs them, and each is imported when its name is first looked up.

    Args:
        kind: What the members are, for messages ("attention mask").
        group: Entry-point group for other distributions. An entry has the form ``name = module:object``.
        base: Class that all members must derive from, including those of other distributions. Defaults to None,
            which allows any callable.

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
        """Returns a decorator that adds a member.

        Raises:
            ValueError: The name is already registered for another member.
            TypeError: The member is not callable, or does not derive from the base class.
        """

        def add(entry: Entry) -> Entry:
            self._add(name, entry)  # type: ignore[arg-type]
            return entry

        return add

    def _add(self, name: str, entry: T) -> None:
        if name in self._members and self._members[name] is not entry:
            raise ValueError(
                f"{self.kind} {name!r} is already registered as {self._members[name]!r}: choose another name"
            )
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
                    log.warning(
                        "%s %r of %s is ignored: the name is already registered", self.kind, point.name, point.value
                    )
                else:
                    self._plugins[point.name] = point
        return self._plugins

    def __getitem__(self, name: str) -> T:
        if name not in self._members:
            if name not in self._external():
                raise UnknownNameError(suggest(self.kind, name, self))
            self._add(name, self._load(name))
        return self._members[name]

    def _load(self, name: str) -> T:
        """Imports a member of another distribution, which may raise anything."""
        point = self._external()[name]
        try:
            member: T = point.load()
        except Exception as error:
            raise PluginError(
                f"{self.kind} {name!r} of another distribution ({point.value}) cannot be loaded: "
                f"{type(error).__name__}: {error}. Repair or uninstall that distribution"
            ) from error
        return member

    def loadable(self) -> Iterator[tuple[str, T]]:
        """Yields names and members; one of another distribution that cannot be loaded is skipped with a warning."""
        for name in self:
            try:
                member = self[name]
            except (PluginError, TypeError) as error:
                log.warning("skipped: %s", error)
            else:
                yield name, member

    def name_of(self, member: T) -> str:
        """Returns the name of a member, and raises `UnknownNameError` if it is not registered.

        Example:
            >>> REG: Registry[type] = Registry("thing", group="example.things")
            >>> REG.register("one")(int)
            <class 'int'>
            >>> REG.name_of(int)
            'one'
        """
        native = (name for name, known in self._members.items() if known is member)
        found = next(native, None) or next((name for name, known in self.loadable() if known is member), None)
        if found is None:
            raise UnknownNameError(f"{member!r} is not a registered {self.kind}: register it")
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._members or name in self._external()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._members, *self._external()}))

    def __len__(self) -> int:
        return len({*self._members, *self._external()})

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}: {', '.join(self)})"


class SpecRegistry(Registry[T], Generic[T, Spec]):
    """A registry that also knows a spec of each member, which is available before the member is called.

    Args:
        kind: What the members are, for messages.
        group: Entry-point group for other distributions.
        spec: Dataclass of the specs. Its field ``name`` is the name of the member; all others have defaults, which are
            used for members without a spec.

    Example:
        >>> from types import SimpleNamespace as Spec  # usually a dataclass
        >>> REG = SpecRegistry("thing", group="example.things", spec=Spec)
        >>> @REG.register("speed", unit="m/s")
        ... def speed() -> float: ...
        >>> REG.spec("speed").unit, REG["speed"] is speed
        ('m/s', True)
    """

    def __init__(self, kind: str, *, group: str, spec: Callable[..., Spec]) -> None:
        super().__init__(kind, group=group)
        self._spec_class = spec
        self._specs: dict[str, Spec] = {}

    def register(self, name: str, **fields: Any) -> Callable[[Entry], Entry]:
        """Returns a decorator that adds a member.

        Args:
            name: Name of the member.
            **fields: Further fields of its spec.
        """
        add = super().register(name)

        def add_with_spec(entry: Entry) -> Entry:
            self._specs[name] = self._spec_class(name=name, **fields)
            return add(entry)

        return add_with_spec

    def spec(self, name: str) -> Spec:
        """Returns the spec of a member; raises `UnknownNameError` for an unknown name."""
        self[name]  # loads a member of another distribution, which may register a spec
        return self._specs.get(name, self._spec_class(name=name))

    def specs(self) -> list[Spec]:
        """Returns all specs, in the order of registration; those of other distributions have defaults until loaded."""
        return [*self._specs.values(), *(self._spec_class(name=name) for name in self if name not in self._specs)]
