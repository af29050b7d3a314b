"""Checks the keys of recipes before they are parsed, and suggests the nearest known key for a typo."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle_zoo.cli.errors import UserError
from dalle_zoo.masks import layer_masks
from dalle_zoo.recipes import Keys, Override, override, resolve, value_at
from dalle_zoo.registry import suggest

_ALL = (
    "seed_everything", "model", "data", "trainer", "checkpoint", "samples", "telemetry", "watch", "ckpt_path",
    "weights_only",
)  # fmt: skip
TOP_KEYS: Mapping[str, tuple[str, ...]] = {
    "fit": _ALL,
    "validate": (*_ALL, "verbose"),
    "test": (*_ALL, "verbose"),
    "predict": (*_ALL, "return_predictions"),
}
"""Top-level keys of a recipe, by command."""
OPTIONS = {"fit": ("run", "parts", "overwrite"), **dict.fromkeys(("validate", "test", "predict"), ("run", "parts"))}
"""Options of the command line that are no keys, by command."""
RESERVED = ("--help", "--print_config")
"""Options that the parser of recipes handles."""

Fields = Mapping[str, Any]
"""Types of values by their keys."""


def fields_of(target: Any) -> dict[str, Any] | None:
    """Keys that a dataclass or a constructor accepts, with their types; None if it accepts any."""
    function: Any = target if dataclasses.is_dataclass(target) else target.__init__
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):  # external annotations that only a type checker can resolve
        hints = {}
    return {
        name: hints.get(name, Any) if p.default is not None else hints.get(name, Any) | None
        for name, p in parameters.items()
        if name != "self"
    }


def dataclass_in(hint: Any) -> Any:
    """The dataclass in a type such as ``TextConfig | None``, or None."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_args(hint) else (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def accepts_null(hint: Any) -> bool:
    """Whether null is a value of a type; unknown types accept anything."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_args(hint) else (hint,)
    return hint is Any or type(None) in options or Any in options or isinstance(hint, str | typing.TypeVar)


def check_names(subcommand: str, files: Mapping[Path, Keys], overrides: Sequence[Override]) -> None:
    """Raises an error for a misspelled top-level key, option or mask, which are known without importing PyTorch.

    All other keys are checked once the classes that accept them are imported.

    Args:
        subcommand: "fit", "validate", "test" or "predict".
        files: Recipe and parts, path to content.
        overrides: Keys of the command line.
    """
    checker = KeyChecker(dict.fromkeys(TOP_KEYS[subcommand]), {})
    for path, content in files.items():
        checker.check(content, str(path))
    for key, text in overrides:
        checker.check(override(key, text or ""), "command line", options=OPTIONS[subcommand])
    keys = resolve(files.values(), overrides)
    masks = value_at(keys, "model.init_args.config.masks")
    if value_at(keys, "model.class_path") == "PriorModule" and isinstance(masks, str):
        layer_masks(masks, num_layers=1)


class KeyChecker:
    """Checks the keys of a recipe.

    Args:
        root: Top-level keys and their fields; None accepts any.
        classes: Classes that ``class_path`` can name without their module, by top-level key.
    """

    def __init__(self, root: Mapping[str, Fields | None], classes: Mapping[str, Mapping[str, type]]) -> None:
        self.root, self.classes = root, classes
        self.chosen: dict[str, type] = {}
        """Classes that the keys checked so far have named."""

    def check(self, keys: Mapping[str, Any], where: str, options: Sequence[str] = ()) -> None:
        """Raises `UserError` for the first unknown key.

        Args:
            keys: Keys of a file or of the command line.
            where: Where they come from, for messages.
            options: Options of the command, which a mistyped key may have meant. Defaults to none.
        """
        for key, value in keys.items():
            name = key.removesuffix("+")
            if name not in self.root:
                kind = "option or key" if options else "key"
                raise UserError(f"{where}: {name}: {suggest(kind, name, [*self.root, *options])}")
            if name in self.classes:
                self._check_class(name, value, where)
            elif self.root[name] is not None:
                self._require_keys(value, self.root[name], where, name)
                self._check_fields(value, self.root[name], where, name)

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
            if item is None and not accepts_null(fields[name]):
                raise UserError(f"{where}: {path}.{name} cannot be null: omit it for its default")
            if inner is not None and fields[name] in (inner, inner | None):
                self._require_keys(item, fields_of(inner), where, f"{path}.{name}")
            if inner is not None:
                self._check_fields(item, fields_of(inner), where, f"{path}.{name}")

    @staticmethod
    def _require_keys(value: Any, fields: Fields | None, where: str, path: str) -> None:
        if value is not None and not isinstance(value, dict):
            known = f" such as {next(iter(fields))}" if fields else ""
            raise UserError(f"{where}: {path} must have keys{known}, got {value!r}")

    @staticmethod
    def _require(name: str, known: Mapping[str, Any], where: str, path: str) -> None:
        if name not in known:
            raise UserError(f"{where}: {path}: {suggest('key', name, known)}")
