"""The generated reference: it covers the package, and what is written by hand about it is true."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.datasets import DATASETS
from dalle_zoo_eval.extractors import EXTRACTORS
from dalle_zoo_eval.metrics import METRICS

from dalle_zoo.cli.main import COMMANDS
from dalle_zoo.masks import MASKS
from dalle_zoo.registry import suggest
from tools.reference.api import PACKAGES, public
from tools.reference.commands import GROUPS, SUBCOMMANDS, command_pages, parser_of
from tools.reference.docstrings import to_restructured_text
from tools.reference.errors import VARIABLE, messages
from tools.reference.pages import from_root
from tools.reference.recipes import BASES, flat, recipe_pages
from tools.reference.registries import NAMES, metrics_page, names_page

WITHOUT_EXAMPLE = {
    "Architecture": "families fill it, see Source",
    "CodeDataset": "the example of encode_source reads one",
    "Conversion": "families fill it, see convert",
    "Found": "families fill it, see Source",
    "ImageTokenizerFamily": "a base class; CONTRIBUTING.md has an example",
    "PluginError": "needs another distribution",
    "PriorFamily": "a base class; CONTRIBUTING.md has an example",
    "StageModule": "a base class of what a training run uses",
    "cached": "writes into the cache of the user",
    "flex": "compiles, which takes seconds",
}
"""Public classes and functions without an example, and why."""

ROOT = Path(__file__).parents[1]
ERRORS = (ROOT / "docs/reference/errors.md").read_text(encoding="utf-8")


def test_every_command_is_in_a_group() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)


def test_a_command_has_all_options_with_their_defaults() -> None:
    page = dict(command_pages())["commands/generate"]
    for action in parser_of("generate")._actions:
        assert all(option in page for option in action.option_strings if option not in ("-h", "--help"))
    assert "| `--out OUT` | the grid, a PNG file | grid.png |" in page
    assert "--mask mask.png    # generate the white part again" in page


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_meaning(command: str) -> None:
    for words in ((), *((word,) for word in SUBCOMMANDS.get(command, ()))):
        parser = parser_of(command, *words)
        assert parser.description, words
        assert [action.dest for action in parser._actions if not action.help] == [], words


def test_names_have_only_the_options_that_a_recipe_can_give() -> None:
    page = names_page()
    assert re.search(r"^\| `hsdp_powersgd` \|.*\| `rank=...`, `shard_size=0`, `wire_bits=32` \|$", page, re.MULTILINE)
    assert "step=..." not in page  # a decay is a function of the step
    assert "| `PriorModule` |" in page  # a recipe names the class of a stage


def test_metrics_have_only_the_options_that_a_protocol_can_give() -> None:
    page = metrics_page()
    assert "reset_real_features" not in page
    assert "Options: `subsets=100`, `subset_size=1000`, `seed=2020`." in page.partition("## kid")[2]
    assert "Options" not in page.partition("## psnr")[2].partition("## ")[0]


def test_recipes_state_their_differences() -> None:
    pages = dict(recipe_pages())
    assert "| `model.config.width` | `192` | `3968` (default) |" in pages["recipes/prior-composition"]
    assert "| `trainer.devices` | `2` | `8` |" in pages["recipes/prior-composition"]
    assert all(f"recipes/{name.replace('/', '-')}" in pages for name in BASES.values())
    callbacks = {"callbacks": [{"class_path": "WeightEMA", "init_args": {"decay": 0.9}}]}
    assert flat({"trainer": callbacks, "model": {"config": {}}}) == {"trainer.callbacks.WeightEMA.decay": 0.9}


def test_every_module_with_public_names_is_documented() -> None:
    declared = set()
    for package in ("dalle_zoo", "eval/dalle_zoo_eval"):
        for path in (ROOT / package).rglob("*.py"):
            if re.search(r"^__all__ = ", path.read_text(encoding="utf-8"), re.MULTILINE):
                module = path.relative_to((ROOT / package).parent).with_suffix("").as_posix().replace("/", ".")
                declared.add(module.removesuffix(".__init__"))
    known = {name for module in PACKAGES for name in public(module)}
    missing = {module for module in declared - set(PACKAGES) if not set(public(module)) <= known}
    assert not missing, "add them to tools/reference/api.py"


def public_members() -> Iterator[tuple[str, str, Any]]:
    """Module, name and value of every public class and function of this project."""
    for module in PACKAGES:
        for name in public(module):
            value = getattr(importlib.import_module(module), name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("dalle_zoo"):
                yield value.__module__, name, value


def has_example(value: Any) -> bool:
    """Whether the documentation of a class, of one of its methods, or of a function has an example."""
    methods = filter(inspect.isroutine, vars(value).values()) if inspect.isclass(value) else ()
    return any(">>>" in (each.__doc__ or "") for each in (value, *methods))


def test_public_names_have_examples() -> None:
    assert {name for _, name, value in public_members() if not has_example(value)} == set(WITHOUT_EXAMPLE)


def test_examples_of_public_names_run() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {
        test.name
        for module in {module for module, _, _ in public_members()}
        for test in finder.find(importlib.import_module(module))
        if test.examples
    }
    expected = {f"{value.__module__}.{value.__qualname__}" for _, _, value in public_members() if has_example(value)}
    assert sorted(name for name in expected if not any(f"{test}.".startswith(f"{name}.") for test in found)) == []


@cache
def raised() -> list[str]:
    """All messages of the package; that of `dalle_zoo.registry.suggest` is not stated in a `raise` statement."""
    return [suggest("mask", "colum", ["column"]), *(message.text for message in messages())]


def test_every_registry_is_listed() -> None:
    groups = {registry.group for _, _, registry in NAMES} | {
        MASKS.group,
        METRICS.group,
        EXTRACTORS.group,
        DATASETS.group,
    }
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert groups == set(re.findall(r"^\| `(dalle_zoo\.\w+)` \|", contributing, flags=re.MULTILINE))


def matches(quoted: str, message: str) -> bool:
    """Whether a quoted message has the words of a message; `VARIABLE` in it stands for any text."""
    pattern = "".join(".*" if part == VARIABLE else re.escape(part) for part in re.split(f"({VARIABLE})", quoted))
    return re.fullmatch(pattern, " ".join(message.replace("`", "").split()), re.DOTALL) is not None


@pytest.mark.parametrize("quoted", re.findall(r"^\| `([^`]+)` \|", ERRORS, flags=re.MULTILINE))
def test_a_quoted_message_is_raised(quoted: str) -> None:
    assert any(matches(quoted, text) for text in raised())


def test_docstrings_become_restructured_text() -> None:
    assert to_restructured_text(["`Metric`s over `a b`, ``x``"]) == [":py:obj:`Metric`\\ s over ``a b``, ``x``"]
    rows = ["| a | b |", "|---|---|", "| `x` | y |"]
    assert to_restructured_text(rows)[1:-1] == [
        ".. list-table::", "   :header-rows: 1", "", "   * - a", "     - b", "   * - :py:obj:`x`", "     - y",
    ]  # fmt: skip
    assert to_restructured_text(["    >>> print(*names)", "a pattern '*'"]) == [
        "    >>> print(*names)",
        "a pattern '\\*'",
    ]
    assert to_restructured_text(["```", "a ─► b", "```"]) == ["::", "", "    a ─► b", ""]


def test_links_of_documents_in_the_root() -> None:
    text = "[a](docs/train/data.md), [b](LICENSE), [c](#d), [e](https://x.org)"
    assert from_root(text) == "[a](../../train/data.md), b, [c](#d), [e](https://x.org)"
