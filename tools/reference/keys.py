"""Reference of the keys of recipes, from the classes that take them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer

from dalle_zoo.cli.fit import key_checker
from dalle_zoo.cli.key_help import NO_DEFAULT, SECTIONS, Key, keys_of
from dalle_zoo.training.averaging import WeightEMA
from tools.reference.markdown import code, escape, first_paragraph, table

HEAD = """\
# Keys of recipes

Every key of a recipe with its default and its meaning. Keys are given in a YAML file or on the command line, where
`init_args` is left out: `--model.config.width 512`. `dalle-zoo fit RECIPE --help` prints those of one recipe, and
`dalle-zoo fit RECIPE --print_config` all values.

A number of steps can be a share of `trainer.max_steps`, such as `2%`.
"""


def keys_page() -> str:
    """Returns the page of all keys."""
    classes = key_checker("fit").classes
    parts = [HEAD, "## At the top\n", _top()]
    for prefix, title in (("model", "Models"), ("data", "Data")):
        parts.append(f"## {title}\n")
        for name, cls in sorted(classes[prefix].items()):
            parts += [
                f"### {name}\n",
                f"`{prefix}: {{class_path: {name}, init_args: ...}}`. {_about(cls)}",
                _table(cls, prefix),
            ]
    parts.append("## Callbacks of every run\n")
    for name, cls in SECTIONS.items():
        parts += [f"### {name}\n", _about(cls), _table(cls, name)]
    parts += ["### WeightEMA\n", "An entry of `trainer.callbacks`. " + _about(WeightEMA), _table(WeightEMA, "")]
    parts += ["## Trainer\n", "The arguments of Lightning's `Trainer`.\n", _table(Trainer, "trainer")]
    return "\n".join(parts)


def _top() -> str:
    rows = [
        ("`seed_everything`", "0", "Seed of the model and of the data, unless they state one"),
        ("`model`, `data`", "", "A class and its arguments: `class_path`, `init_args`"),
        ("`trainer`", "", "Arguments of Lightning's trainer"),
        *((f"`{name}`", "", first_paragraph(cls)) for name, cls in SECTIONS.items()),
        ("`ckpt_path`", "the newest intact checkpoint", "Checkpoint to resume from"),
    ]
    return table(("key", "default", "meaning"), rows)


def _about(cls: type) -> str:
    return first_paragraph(cls) + ".\n"


def default_of(key: Key) -> str:
    """Returns the default of a key as Markdown: empty for a group of keys, "required" if there is none."""
    if key.default is NO_DEFAULT:
        return "required"
    value: Any = key.default
    if dataclasses.is_dataclass(value):
        return ""
    return code(value.__name__ if inspect.isclass(value) or inspect.isfunction(value) else value)


def _table(cls: type, prefix: str) -> str:
    return table(("key", "value", "default", "meaning"), _rows(cls, prefix))


def _rows(cls: type, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for key in keys_of(cls):
        name = f"{prefix}.{key.name}" if prefix else key.name
        yield code(name), code(key.kind), default_of(key), escape(key.meaning)
