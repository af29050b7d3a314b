"""Data files of the package: where they lie, and YAML that is read strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dalle_zoo.registry import suggest

_PACKAGE = Path(__file__).parent


class DataFileError(ValueError):
    """A protocol or a table of published scores that cannot be used; the message names the file and the place."""


def shipped_folder(kind: str) -> Path:
    """Folder of data files: in a wheel inside the package, in a checkout beside it.

    Args:
        kind: "protocols" or "published".
    """
    roots = (_PACKAGE / f"_{kind}", _PACKAGE.parent / kind)
    for root in roots:
        if root.is_dir():
            return root
    raise FileNotFoundError(f"no {kind} found: expected {' or '.join(str(root) for root in roots)}")


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Raises:
        DataFileError: It is not there, is no valid YAML, has a key twice, or holds something else.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataFileError(f"{path} is not valid YAML: {error}") from None
    return mapping(value, str(path))


def mapping(value: object, where: str) -> dict[str, Any]:
    """A value that must be a mapping with names as keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise DataFileError(f"{where} must be a mapping of names to values, got {value!r}")
    return dict(value)


def check_keys(given: Iterable[str], known: Iterable[str], where: str, *, required: Iterable[str] = ()) -> None:
    """Checks the keys of a mapping.

    Raises:
        DataFileError: One is unknown, with the nearest right one, or a required one is missing.
    """
    given, known = list(given), list(known)
    for name in given:
        if name not in known:
            raise DataFileError(f"{where}: {suggest('field', name, known)}")
    missing = [name for name in required if name not in given]
    if missing:
        raise DataFileError(f"{where}: {', '.join(missing)} missing: every {where.rpartition(': ')[2]} states it")
