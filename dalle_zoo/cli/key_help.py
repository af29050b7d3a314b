"""``dalle-zoo fit RECIPE --help``: the keys of a recipe with their meaning, their value and their default."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import docstring_parser
from lightning.pytorch import Trainer

from dalle_zoo.cli.fit import check_keys, key_checker
from dalle_zoo.cli.keys import dataclass_in
from dalle_zoo.recipes import Keys, Override, resolve, value_at
from dalle_zoo.training.callbacks import ImageLogger
from dalle_zoo.training.saving import Checkpoint
from dalle_zoo.training.telemetry import Telemetry
from dalle_zoo.training.watch import RankWatch

NO_DEFAULT = inspect.Parameter.empty
SECTIONS: Mapping[str, type] = {
    "samples": ImageLogger,
    "checkpoint": Checkpoint,
    "telemetry": Telemetry,
    "watch": RankWatch,
}
"""Top-level keys besides model, data and trainer, and the class whose arguments they hold."""


class Key(NamedTuple):
    """A key of a recipe."""

    name: str
    kind: str
    """Type of its values, for people."""
    meaning: str
    default: Any
    """`NO_DEFAULT` if it must be given."""


def keys_of(target: Any) -> Iterator[Key]:
    """Yields the arguments of a class, or the fields of a dataclass; those of a nested dataclass with a dot."""
    fields = dataclasses.is_dataclass(target)
    function: Any = target if fields else target.__init__
    try:
        hints = typing.get_type_hints(target if fields else function)
    except (NameError, TypeError):  # external annotations that only a type checker can resolve
        hints = {}
    meanings = _meanings(target)
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        hint = hints.get(name, Any)
        inner = dataclass_in(hint)
        if inner is None:
            yield Key(name, _kind(hint), meanings.get(name, ""), parameter.default)
            continue
        chosen = parameter.default
        yield Key(name, inner.__name__, meanings.get(name, ""), chosen)
        for key in keys_of(inner):
            default = getattr(chosen, key.name, key.default) if dataclasses.is_dataclass(chosen) else key.default
            yield Key(f"{name}.{key.name}", key.kind, key.meaning, default)


def _meanings(target: Any) -> dict[str, str]:
    bases = [base for base in inspect.getmro(target) if dataclasses.is_dataclass(base)]
    parsed = [docstring_parser.parse_from_object(base) for base in bases]  # a field is documented where it is declared
    parsed += [docstring_parser.parse(text) for text in (target.__doc__, target.__init__.__doc__) if text]
    found: dict[str, str] = {}
    for docstring in parsed:
        for parameter in docstring.params:
            found.setdefault(parameter.arg_name, " ".join((parameter.description or "").split()))
    return found


def _kind(hint: Any) -> str:
    """Returns a short name of a type: its choices, or the name of a plain type."""
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    for plain in (bool, int, float, str, list):
        if plain in (hint, typing.get_origin(hint), *map(_origin, typing.get_args(hint))):
            return plain.__name__.upper()
    return "VALUE"


def _origin(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def print_keys(
    page: argparse.ArgumentParser, subcommand: str, files: Mapping[Path, Keys], overrides: list[Override]
) -> None:
    """Prints the keys of a recipe: first those of model and data, last those of Lightning's trainer.

    Args:
        page: Parser of the command's options, which are printed first.
        subcommand: "fit", "validate", "test" or "predict".
        files: Recipe and parts, path to content.
        overrides: Keys of the command line.
    """
    check_keys(subcommand, files, overrides)
    recipe = resolve(files.values(), overrides)
    page.epilog = (
        "A number of steps can be a share of trainer.max_steps, such as 2%. All keys with their values: "
        f"dalle-zoo {subcommand} RECIPE --print_config"
    )
    for part in ("model", "data"):
        path = str(value_at(recipe, f"{part}.class_path"))
        cls = key_checker(subcommand).classes[part].get(path)
        _add_section(page, f"{part}: {path}", part, cls, value_at(recipe, f"{part}.init_args") or {})
    for name, cls in SECTIONS.items():
        _add_section(page, name, name, cls, recipe.get(name) or {})
    _add_section(page, "trainer: Lightning's", "trainer", Trainer, recipe.get("trainer") or {})
    page.print_help()


def _add_section(page: argparse.ArgumentParser, title: str, prefix: str, cls: type | None, given: Keys) -> None:
    summary = (inspect.getdoc(cls) or "").partition("\n")[0] if cls else "a class of another distribution"
    group = page.add_argument_group(title, summary)
    for key in keys_of(cls) if cls else ():
        value = value_at(given, key.name)
        notes = [] if value is None or isinstance(value, Mapping) else [f"{value} in the recipe"]
        if key.default is not NO_DEFAULT and not dataclasses.is_dataclass(key.default):
            notes.append(f"default {key.default}" if notes else f"{key.default}")
        text = key.meaning + (f" [{', '.join(notes)}]" if notes else "")
        group.add_argument(f"--{prefix}.{key.name}", metavar=key.kind, help=text.replace("%", "%%"))
