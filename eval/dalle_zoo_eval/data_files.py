"""Finds the data files of the package, reads YAML strictly, and checks its values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dalle_zoo.plain_data import PlainDataError, PlainLoader, yaml_value
from dalle_zoo.registry import suggest
from dalle_zoo.values import as_integer, as_number

_PACKAGE = Path(__file__).parent


C = TypeVar("C")


class DataFileError(ValueError):
    """A protocol or a table of published scores cannot be used; the message names the file and the field."""


def bundled_folder(kind: str) -> Path:
    """Returns a folder of data files: inside the package in a wheel, next to it in a checkout.

    Args:
        kind: "protocols" or "published".
    """
    roots = (_PACKAGE / f"_{kind}", _PACKAGE.parent / kind)
    for root in roots:
        if root.is_dir():
            return root
    raise FileNotFoundError(f"no {kind} found: expected {' or '.join(str(root) for root in roots)}")


class _StrictLoader(PlainLoader):
    """Rejects a key that appears twice in a mapping; YAML itself would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} appears twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Raises:
        DataFileError: The file is missing, is not valid YAML, repeats a key, or holds no mapping.
    """
    try:
        value = yaml_value(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path} is not valid YAML: {error}") from None
    except PlainDataError as error:
        raise DataFileError(f"{path} {error}") from None
    return mapping(value, str(path))


def mapping(value: object, where: str) -> dict[str, Any]:
    """Returns a mapping with names as keys; raises `DataFileError` for any other value."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise DataFileError(f"{where} must be a mapping of names to values, got {value!r}")
    return dict(value)


def check_keys(given: Iterable[str], known: Iterable[str], where: str, *, required: Iterable[str] = ()) -> None:
    """Checks the keys of a mapping.

    Raises:
        DataFileError: A key is unknown (the message suggests the nearest one), or a required key is missing.
    """
    given, known = list(given), list(known)
    for name in given:
        if name not in known:
            raise DataFileError(f"{where}: {suggest('field', name, known)}")
    missing = [name for name in required if name not in given]
    if missing:
        text = "fields {} are" if len(missing) > 1 else "field {} is"
        raise DataFileError(f"{where}: the {text.format(', '.join(map(repr, missing)))} required")


def build(kind: type[C], values: object, where: str) -> C:
    """Builds a dataclass from a mapping; lists become tuples.

    Raises:
        DataFileError: A field is unknown, missing, or is not a list where a list is expected.
    """
    given = mapping(values, where)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    check_keys(given, known, where, required=required)
    lists = [n for n, f in known.items() if str(f.type).startswith("tuple")]
    return kind(**{n: tuple(sequence(n, v)) if n in lists else v for n, v in given.items()})


def sequence(name: str, value: object) -> list[Any]:
    """Returns a list; raises `DataFileError` for any other value."""
    if not isinstance(value, list | tuple):
        raise DataFileError(f"{name} must be a list, got {value!r}")
    return list(value)


def is_number(value: object) -> bool:
    """Returns whether a value is a finite number."""
    try:
        as_number("value", value)
    except (TypeError, ValueError):
        return False
    return True


def check_bool(name: str, value: object) -> None:
    """Raises `DataFileError` unless a value is true or false."""
    if not isinstance(value, bool):
        raise DataFileError(f"{name} must be true or false, got {value!r}")


def check_integer(name: str, value: object, least: int) -> int:
    """Returns an integer as `as_integer`, with errors of data files."""
    try:
        return as_integer(name, value, least=least)
    except (TypeError, ValueError) as error:
        raise DataFileError(str(error)) from None


def check_rising(name: str, values: tuple[int, ...], least: int) -> None:
    """Raises `DataFileError` unless integers are strictly increasing, from at least ``least``."""
    for value in values:
        check_integer(name, value, least)
    if list(values) != sorted(set(values)):
        raise DataFileError(f"{name} must be strictly increasing, got {list(values)}")


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raises `DataFileError` unless a value is one of the known names."""
    known = list(known)
    if value not in known:
        raise DataFileError(suggest(name, str(value), known))


def check_choices(name: str, values: Iterable[str], known: Iterable[str]) -> None:
    """Raises `DataFileError` unless values are known names, each at most once."""
    values = list(values)
    for value in values:
        check_choice(name, value, known)
    if len(set(values)) != len(values):
        raise DataFileError(f"{name} repeats a name: {', '.join(values)}")
