"""Parses JSON and YAML of unknown origin within limits of size and depth.

Every file of this kind is parsed here. Without the limits a few bytes can end a process: nested brackets overflow the
stack, aliases of YAML expand to any number of values, and long numbers take minutes. The errors say what is wrong with
the file ("is not valid JSON: ..."); the readers of files put its name in front.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

import yaml

MAX_BYTES = 16 * 2**20
"""Size limit of a text, unless its reader states another. Parsed values take up to 30 times its size."""
MAX_YAML = 2**20
"""Limit of the characters of YAML, which takes seconds per MiB."""
MAX_DEPTH = 64
"""Limit of nested lists and mappings."""
MAX_NUMBER = 300
"""Limit of the characters of a number: Python takes quadratic time for some notations of YAML, and longer integers are
beyond the range of floating-point numbers."""


class PlainDataError(ValueError):
    """A text is not valid, too long, or nested too deeply."""


def json_value(
    data: bytes,
    *,
    max_bytes: int = MAX_BYTES,
    finite: bool = True,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """Parses JSON.

    Args:
        data: UTF-8 text.
        max_bytes: Size limit. Defaults to `MAX_BYTES`.
        finite: Whether NaN and infinity, which are not JSON but which Python writes, are errors. Defaults to True.
        pairs: Function that makes the value of an object from its pairs, such as `unique_keys`. Defaults to a dict
            with the last value of each key.

    Raises:
        PlainDataError: The text is not valid JSON, too long, or nested too deeply.
    """
    _check_size(len(data), max_bytes)
    options: dict[str, Any] = {"parse_constant": _not_finite, "parse_float": _finite_float} if finite else {}
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_int=_short_integer, **options)
    except PlainDataError:
        raise
    except RecursionError:
        raise PlainDataError(_TOO_DEEP) from None
    except ValueError as error:  # of JSON and UTF-8
        raise PlainDataError(f"is not valid JSON: {str(error)[:200]}") from None
    _check_depth(value)
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a dict, or raises `PlainDataError` if a key is repeated."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise PlainDataError(f"has the key {key[:100]!r} twice in one object")
        found[key] = value
    return found


class PlainLoader(yaml.SafeLoader):
    """Loads plain YAML of limited depth."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.aliases = False
        self._depth = 0

    def fetch_flow_collection_start(self, token: Any) -> None:
        """Reads an opening bracket; PyYAML reads up to 1,024 of them before the first is composed."""
        if self.flow_level >= MAX_DEPTH:
            raise PlainDataError(_TOO_DEEP)
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Returns the next node."""
        if not self.aliases and self.check_event(yaml.AliasEvent):
            raise PlainDataError("has aliases (*name), which are not supported: replace them with their values")
        if self._depth > MAX_DEPTH:
            raise PlainDataError(_TOO_DEEP)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if (
            isinstance(node, yaml.ScalarNode)
            and len(node.value) > MAX_NUMBER
            and node.tag.endswith((":int", ":float"))
        ):
            raise _too_long(node.value)
        return node


def yaml_value(text: str, loader: type[PlainLoader] = PlainLoader, *, aliases: bool = False) -> Any:
    """Parses YAML.

    Args:
        text: The text, at most `MAX_YAML` characters.
        loader: Class that loads it. Defaults to `PlainLoader`.
        aliases: Whether aliases are allowed, in a file of the user's own. Defaults to False.

    Raises:
        PlainDataError: The text is not valid YAML, too long, nested too deeply, or has aliases.
    """
    _check_size(len(text), MAX_YAML)
    try:
        opened = loader(text)
        opened.aliases = aliases
        return opened.get_single_data()
    except PlainDataError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # dates and numbers raise the others
        raise PlainDataError(f"is not valid YAML: {' '.join(str(error).split())[:300]}") from None


_TOO_DEEP = f"nests lists and mappings more than {MAX_DEPTH} deep"


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise PlainDataError(f"has more than {limit} bytes")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [node for node in level if isinstance(node, dict | list)]
        if not containers:
            return
        level = [part for node in containers for part in (node.values() if isinstance(node, dict) else node)]
    raise PlainDataError(_TOO_DEEP)


def _too_long(number: str) -> PlainDataError:
    return PlainDataError(f"has a number of {len(number)} characters, the limit is {MAX_NUMBER}")


def _short_integer(text: str) -> int:
    if len(text) > MAX_NUMBER:
        raise _too_long(text)
    return int(text)


def _not_finite(name: str) -> NoReturn:
    raise PlainDataError(f"is not valid JSON: it has the number {name}")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise PlainDataError(f"has the number {text[:40]}, which is beyond the range of floating-point numbers")
    return value
