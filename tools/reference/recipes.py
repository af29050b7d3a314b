"""Reference of the recipes, from their headers and their differences to the recipe of the paper."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dalle_zoo.cli.fit import key_checker
from dalle_zoo.cli.key_help import keys_of
from dalle_zoo.recipes import find_part, find_recipe, list_recipes, read_recipe, recipe_header, recipe_root
from tools.reference.keys import default_of
from tools.reference.markdown import code, escape, table

BASES = {"dvae": "dvae/paper", "prior": "prior/paper-12b"}
"""Recipe of the paper for each kind; others are compared with the defaults of their classes."""
FACTS = ("command", "hardware", "score")
"""What a header states, each on a line of its own or on several indented ones."""


def recipe_index() -> str:
    """Returns the page that lists recipes and parts."""
    rows = [(f"[`{name}`](recipes/{name.replace('/', '-')}.md)", _title(name)) for name in list_recipes()]
    parts = sorted(path.stem for path in (recipe_root() / "_parts").glob("*.yaml"))
    hidden = "\n".join(f"recipes/{name.replace('/', '-')}" for name in list_recipes())
    return "\n".join(
        [
            "# Recipes\n",
            "A recipe is a YAML file that determines a training run: `dalle-zoo fit RECIPE`. "
            "Those of the paper's sizes state the paper's values.\n",
            table(("recipe", "what it trains"), rows),
            "## Parts\n",
            "A part is merged into a recipe: `dalle-zoo fit RECIPE --parts PART`. Later parts win.\n",
            table(("part", "what it changes", "keys"), map(_part, parts)),
            f"```{{toctree}}\n:hidden:\n{hidden}\n```\n",
        ]
    )


def recipe_pages() -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each page: one for each recipe."""
    for name in list_recipes():
        text = find_recipe(name).read_text(encoding="utf-8")
        parts = [f"# {name}\n", f"{_title(name)}.\n", *_header(name)]
        base = BASES.get(name.partition("/")[0])
        if base == name:
            parts += ["## Keys\n", "All other keys have the defaults of their classes, which are the paper's.\n"]
        else:
            against = f"[`{base}`]({base.replace('/', '-')}.md)" if base else "the defaults of its classes"
            parts += [f"## Differences to {against}\n"]
        parts += [_differences(name, base if base != name else None)]
        parts += ["## File\n", f"```yaml\n{text.rstrip()}\n```\n"]
        yield f"recipes/{name.replace('/', '-')}", "\n".join(parts)


def _title(name: str) -> str:
    return escape(recipe_header(name).splitlines()[0]).removesuffix(".")


def _part(name: str) -> tuple[str, str, str]:
    path = find_part(name)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    what = lines[0].removeprefix("# ").partition(": dalle-zoo")[0]
    keys = ", ".join(code(f"{key}={value}") for key, value in flat(read_recipe(path)).items())
    return code(name), escape(what), keys


def _header(name: str) -> Iterator[str]:
    """Yields the facts of a header as blocks, and its other paragraphs."""
    paragraphs = recipe_header(name).split("\n\n")
    yield from (escape(text) + "\n" for text in ["\n".join(paragraphs[0].splitlines()[1:])] if text)
    for paragraph in paragraphs[1:]:
        facts = re.split(rf"^(?:({'|'.join(FACTS)})) +", paragraph, flags=re.MULTILINE)
        if facts[0].strip():
            yield escape(facts[0]) + "\n"
        for fact, text in zip(facts[1::2], facts[2::2], strict=True):
            if fact == "command":
                yield "\n".join(["```text", *(line.strip() for line in text.strip().splitlines()), "```\n"])
            else:
                yield f"**{fact.capitalize()}.** {escape(text)}\n"


def flat(keys: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested keys as dotted names; classes in a list are named."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}".removeprefix(".")
        if isinstance(value, Mapping):
            found |= flat(value, name)
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for item in value:
                found |= flat(item.get("init_args") or {}, f"{name}.{item['class_path']}")
        else:
            found[name] = value
    return found


def _differences(name: str, base: str | None) -> str:
    here = flat(read_recipe(find_recipe(name)))
    there = flat(read_recipe(find_recipe(base))) if base else {}
    defaults = _defaults(here)
    rows = [
        (code(key), code(here[key]) if key in here else "not set", _other(key, there, defaults))
        for key in [*here, *(key for key in there if key not in here)]
        if not key.endswith("class_path") or here.get(key) != there.get(key)
        if here.get(key, defaults) != there.get(key, defaults)
    ]
    return table(("key", "here", "there" if base else "default"), rows)


def _other(key: str, there: Mapping[str, Any], defaults: Mapping[str, str]) -> str:
    if key in there:
        return code(there[key])
    return f"{defaults[key]} (default)" if defaults.get(key) else ""


def _defaults(keys: Mapping[str, Any]) -> dict[str, str]:
    """Returns the defaults of the classes that a recipe names."""
    classes = key_checker("fit").classes
    found: dict[str, str] = {}
    for prefix in ("model", "data"):
        cls = classes[prefix].get(str(keys.get(f"{prefix}.class_path")))
        found |= {f"{prefix}.{key.name}": default_of(key) for key in keys_of(cls)} if cls else {}
    return found
