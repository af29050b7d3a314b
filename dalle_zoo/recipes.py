"""Recipes: YAML files that state how a model is trained, found by name."""

from __future__ import annotations

from pathlib import Path

from dalle_zoo.registry import UnknownNameError, suggest

_PACKAGE = Path(__file__).parent
_ROOTS = (_PACKAGE / "_recipes", _PACKAGE.parent / "recipes")
"""A wheel has the recipes inside the package; a checkout has them next to it."""


def recipe_root() -> Path:
    """Folder that holds the recipes of this installation."""
    for root in _ROOTS:
        if root.is_dir():
            return root
    raise FileNotFoundError(f"no recipes found: expected {' or '.join(str(root) for root in _ROOTS)}")


def list_recipes() -> list[str]:
    """Names such as "dvae/emoji64"; folders that start with an underscore hold parts, not recipes."""
    root = recipe_root()
    names = (path.relative_to(root).with_suffix("").as_posix() for path in root.glob("*/*.yaml"))
    return sorted(name for name in names if not name.startswith("_"))


def find_recipe(name: str) -> Path:
    """Path of a recipe: a name from `list_recipes`, or a YAML file of one's own.

    Raises:
        UnknownNameError: Neither; the message has the nearest name.
    """
    path = recipe_root() / f"{name}.yaml"
    if path.is_file() and not name.startswith("_"):
        return path
    if Path(name).is_file():
        return Path(name)
    raise UnknownNameError(f"{suggest('recipe', name, list_recipes())}. A YAML file works as well.")


def find_part(name: str) -> Path:
    """Path of a recipe part: a name below ``recipes/_parts``, or a YAML file of one's own."""
    path = recipe_root() / "_parts" / f"{name}.yaml"
    if path.is_file():
        return path
    if Path(name).is_file():
        return Path(name)
    known = [p.stem for p in (recipe_root() / "_parts").glob("*.yaml")]
    raise UnknownNameError(f"{suggest('recipe part', name, known)}. A YAML file works as well.")


def recipe_header(name: str) -> str:
    """The comment block at the top of a recipe: command, cost, expected score."""
    lines = find_recipe(name).read_text(encoding="utf-8").splitlines()
    header = []
    for line in lines:
        if not line.startswith("#"):
            break
        header.append(line.removeprefix("#").strip())
    return "\n".join(header)
