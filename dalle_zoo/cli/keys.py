"""Checks the keys of recipes before the parser sees them, to answer a typo with the nearest right key."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dalle_zoo.cli.errors import UserError
from dalle_zoo.registry import suggest

Fields = Mapping[str, Any]
"""Name of a key to the type of its value."""


def fields_of(target: Any) -> dict[str, Any] | None:
    """Keys that a dataclass or a constructor takes, with their types; None if it takes any."""
    function: Any = target if dataclasses.is_dataclass(target) else target.__init__
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):  # external annotations that only a type checker can resolve
        hints = {}
    return {name: hints.get(name, Any) for name in parameters if name != "self"}


def dataclass_in(hint: Any) -> Any:
    """The dataclass in a type such as ``TextConfig | None``, or None."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_args(hint) else (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


class KeyChecker:
    """Knows the keys of a recipe.

    Args:
        root: Top-level keys to their fields: None takes anything.
        classes: Short names that ``class_path`` may take, by top-level key.
        options: What else may stand on the command line, to suggest it.
    """

    def __init__(
        self,
        root: Mapping[str, Fields | None],
        classes: Mapping[str, Mapping[str, type]],
        options: Sequence[str] = (),
    ) -> None:
        self.root, self.classes, self.options = root, classes, options
        self.chosen: dict[str, type] = {}

    def check_file(self, values: Any, where: str) -> None:
        """Raises `UserError` for the first unknown key of a recipe's content."""
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected keys such as model, data and trainer, got {type(values).__name__}")
        for name, value in values.items():
            self._require(name, self.root, where, name)
            if name in self.classes:
                self._check_class(name, value, where)
            else:
                self._check_fields(value, self.root[name], where, name)

    def check_override(self, key: str, value: str) -> None:
        """Raises `UserError` when an override such as ``trainer.max_steps`` names no key, or no class."""
        where, parts = "command line", key.removesuffix("+").split(".")
        if parts[0] not in self.root:
            raise UserError(f"{where}: {suggest('option or key', parts[0], [*self.root, *self.options])}")
        fields = self.root[parts[0]]
        rest = parts[1:]
        if parts[0] in self.classes:
            if not rest or rest[0] == "class_path":
                self._check_class(parts[0], {"class_path": value}, where)
                return
            cls = self.chosen.get(parts[0])
            fields = fields_of(cls) if cls else None
            if rest[0] == "init_args":  # may be left out
                rest = rest[1:]
        path = parts[: len(parts) - len(rest)]
        for part in rest:
            if fields is None:
                return
            path.append(part)
            self._require(part, fields, where, ".".join(path))
            inner = dataclass_in(fields[part])
            fields = fields_of(inner) if inner else None

    def _check_class(self, name: str, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise UserError(f"{where}: {name} must have class_path and init_args, got {value!r}")
        for key in value:
            self._require(key, {"class_path": None, "init_args": None}, where, f"{name}.{key}")
        path = value.get("class_path")
        if path is not None and "." not in str(path):
            if path not in self.classes[name]:
                raise UserError(f"{where}: {suggest('class', str(path), self.classes[name])}")
            self.chosen[name] = self.classes[name][path]
        if name in self.chosen:
            fields = fields_of(self.chosen[name])
            self._check_fields(value.get("init_args") or {}, fields, where, f"{name}.init_args")

    def _check_fields(self, value: Any, fields: Fields | None, where: str, path: str) -> None:
        if fields is None or not isinstance(value, dict):
            return
        for key, item in value.items():
            name = key.removesuffix("+")
            self._require(name, fields, where, f"{path}.{name}")
            inner = dataclass_in(fields[name])
            if inner is not None:
                self._check_fields(item, fields_of(inner), where, f"{path}.{name}")

    @staticmethod
    def _require(name: str, known: Mapping[str, Any], where: str, path: str) -> None:
        if name not in known:
            raise UserError(f"{where}: {path}: {suggest('key', name, known)}")


def overridden(overrides: list[str]) -> Iterator[tuple[str, str]]:
    """Keys and values of a command line such as ``--trainer.max_steps 10 --data.batch_size=4``."""
    for argument, following in itertools.pairwise([*overrides, ""]):
        if argument.startswith("--") and argument not in ("--help", "--print_config"):
            key, _, value = argument[2:].partition("=")
            yield key, value or following
