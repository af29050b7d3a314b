"""Recipes: YAML files that state how a model is trained. They are found and merged here, for every command."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dalle_zoo.plain_data import PlainDataError, PlainLoader, yaml_value
from dalle_zoo.registry import UnknownNameError, suggest

Keys = Mapping[str, Any]
"""Content of a recipe: nested keys such as ``{"trainer": {"max_steps": 10}}``."""

Override = tuple[str, str | None]
"""Key on a command line and its value as text."""

CLASSES = ("model", "data")
"""Keys whose values name a class: ``class_path``, and its arguments in ``init_args``."""

STEPS = frozenset(
    {"steps", "warmup_steps", "decay_steps", "quantized_steps", "plateau_window", "every", "val_check_interval"}
)
"""Names of keys that are numbers of steps, so that they can be given as a share of the run."""
STEPS_OF_CALLBACKS = STEPS | {"start"}
"""The same below ``callbacks``; elsewhere ``start`` is the first value of a schedule."""

_PACKAGE = Path(__file__).parent
_ROOTS = (_PACKAGE / "_recipes", _PACKAGE.parent / "recipes")
"""A wheel has the recipes inside the package, a checkout next to it."""


def recipe_root() -> Path:
    """Folder that holds the recipes of this installation."""
    for root in _ROOTS:
        if root.is_dir():
            return root
    raise FileNotFoundError(f"no recipes found: expected {' or '.join(str(root) for root in _ROOTS)}")


def list_recipes() -> list[str]:
    """Names such as "dvae/composition"; folders that start with an underscore hold parts, not recipes.

    Example:
        >>> "prior/tiny" in list_recipes()
        True
    """
    root = recipe_root()
    names = (path.relative_to(root).with_suffix("").as_posix() for path in root.glob("*/*.yaml"))
    return sorted(name for name in names if not name.startswith("_"))


def find_recipe(name: str) -> Path:
    """Path of a recipe: a name from `list_recipes`, or the path of another YAML file.

    Raises:
        UnknownNameError: It is neither; the message suggests the nearest name.

    Example:
        >>> find_recipe("prior/tiny").name
        'tiny.yaml'
    """
    path = recipe_root() / f"{name}.yaml"
    if path.is_file() and not name.startswith("_"):
        return path
    if Path(name).is_file():
        return Path(name)
    raise UnknownNameError(f"{suggest('recipe', name, list_recipes())}. A YAML file works as well.")


def find_part(name: str) -> Path:
    """Path of a recipe part: a name in ``recipes/_parts``, or the path of another YAML file.

    Raises:
        UnknownNameError: It is neither; the message suggests the nearest name.
    """
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


# ------------------------------------------------------------ reading and merging


class _Loader(PlainLoader):
    """YAML with the numbers of version 1.2: 1e-3 is one, 10:00:00 and 2024-01-01 are text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":int", ":float", ":timestamp"))]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_INTEGER = re.compile(r"[-+]?(?:\d[\d_]*|0x[\da-fA-F]+)$")
_FLOAT = re.compile(r"[-+]?(?:(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\.inf)$|\.nan$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, [*"-+0123456789"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+0123456789."])


def _unique_keys(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    """Constructs a mapping, and rejects a key that is given twice: YAML would keep the last and drop the first."""
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # ``<<: *anchor``, whose keys may be given again
            continue
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if isinstance(key, Hashable) and key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice, in line {seen[key]} and in line {line}: merge the two"
            )
        if isinstance(key, Hashable):
            seen[key] = line
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_keys)


def read_recipe(path: Path) -> dict[str, Any]:
    """Keys of a recipe or of a part.

    Raises:
        ValueError: The file is not valid YAML, or does not hold keys.

    Example:
        >>> read_recipe(find_recipe("prior/tiny"))["trainer"]["max_steps"]
        10
    """
    try:
        content = yaml_value(path.read_text(encoding="utf-8"), _Loader, aliases=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    except PlainDataError as error:
        raise ValueError(f"{path} {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys such as model, data and trainer, got {type(content).__name__}")
    return content


def split_arguments(arguments: Sequence[str], reserved: Sequence[str] = ()) -> tuple[list[Override], list[str]]:
    """Separates the keys on a command line from its other arguments.

    Args:
        arguments: For instance ``["--trainer.max_steps", "10", "--data.batch_size=4", "--help"]``.
        reserved: Options that are no keys.

    Returns:
        Pairs such as ``("trainer.max_steps", "10")``, with None for a missing value, and the remaining arguments.
    """
    keys: list[Override] = []
    others, waiting = [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--") or argument in reserved:
            others.append(argument)
            continue
        key, equals, value = argument[2:].partition("=")
        if equals:
            keys.append((key, value))
        else:
            keys.append((key, waiting.pop(0) if waiting and not waiting[0].startswith("--") else None))
    return keys, others


def complete_key(key: str) -> str:
    """A key with the ``init_args`` that the command line may leave out: "data.init_args.seed" for "data.seed"."""
    path = key.split(".")
    if path[0] in CLASSES and len(path) > 1 and path[1] not in ("class_path", "init_args"):
        path.insert(1, "init_args")
    return ".".join(path)


def override(key: str, text: str) -> dict[str, Any]:
    """Returns the nested keys of a key on the command line.

    Example:
        >>> override("data.batch_size", "4"), override("model", "PriorModule")
        ({'data': {'init_args': {'batch_size': 4}}}, {'model': {'class_path': 'PriorModule'}})
    """
    try:
        value = yaml_value(text, _Loader)
    except PlainDataError:
        value = text
    if key in CLASSES and not isinstance(value, dict):
        value = {"class_path": value}
    for part in reversed(complete_key(key).split(".")):
        value = {part: value}
    return dict(value)


def merge(below: Keys, above: Keys) -> dict[str, Any]:
    """Merges two sets of keys: those of ``above`` win.

    Mappings are merged key by key. Another ``class_path`` discards the arguments of the old class; a key that ends
    in ``+`` appends to a list; keys below a list are arguments of the class in its last entry.

    Example:
        >>> merge({"trainer": {"max_steps": 10, "devices": 1}}, {"trainer": {"max_steps": 20}})
        {'trainer': {'max_steps': 20, 'devices': 1}}
        >>> merge({"callbacks": ["A"]}, {"callbacks+": "B"})
        {'callbacks': ['A', 'B']}
    """
    merged = dict(below)
    for key, value in above.items():
        name = key.removesuffix("+")
        old = merged.get(name)
        if key.endswith("+"):
            merged[name] = [*(old or []), *(value if isinstance(value, list) else [value])]
        elif isinstance(old, Mapping) and isinstance(value, Mapping):
            another = value.get("class_path", old.get("class_path")) != old.get("class_path")
            merged[name] = dict(value) if another else merge(old, value)
        elif isinstance(old, list) and old and isinstance(value, Mapping) and "class_path" not in value:
            last = old[-1] if isinstance(old[-1], Mapping) else {"class_path": old[-1]}
            merged[name] = [*old[:-1], merge(last, value if "init_args" in value else {"init_args": value})]
        else:
            merged[name] = value
    return merged


def resolve(files: Iterable[Keys], overrides: Iterable[Override] = ()) -> dict[str, Any]:
    """Merges a recipe, its parts, keys of the command line and the common seed, the only place that does.

    Args:
        files: Contents of the recipe and its parts; later ones win.
        overrides: Keys of the command line and their values, which win over files.

    Returns:
        All keys that are stated. ``seed_everything``, if it is a number, becomes the seed of the model and of the
        data, unless they state one or are external classes, which need not have one.

    Raises:
        ValueError: A key of the command line has no value.

    Example:
        >>> resolve([{"trainer": {"max_steps": 10, "devices": 1}}], [("trainer.max_steps", "20")])
        {'trainer': {'max_steps': 20, 'devices': 1}}
    """
    keys: dict[str, Any] = {}
    for content in files:
        keys = merge(keys, content)
    for key, text in overrides:
        if text is None:
            raise ValueError(f"--{key} has no value")
        keys = merge(keys, override(key, text))
    seed = keys.get("seed_everything")
    for part in CLASSES if isinstance(seed, int) and not isinstance(seed, bool) else ():
        chosen = keys.get(part)
        if isinstance(chosen, Mapping) and "." not in str(chosen.get("class_path", ".")):
            keys = merge({part: {"class_path": chosen["class_path"], "init_args": {"seed": seed}}}, keys)
    return keys


_SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")


def resolve_shares(keys: Keys, length: int | None = None) -> dict[str, Any]:
    """Replaces shares of the run, such as ``warmup_steps: 2%``, by numbers of steps, at least 1.

    Args:
        keys: Keys of a recipe.
        length: Steps that the shares refer to. Defaults to ``trainer.max_steps``.

    Raises:
        ValueError: A share is above 100 %, or the recipe has no length that it could refer to.

    Example:
        >>> resolve_shares({"trainer": {"max_steps": 500}, "checkpoint": {"every": "10%"}})["checkpoint"]
        {'every': 50}
    """
    length = value_at(keys, "trainer.max_steps") if length is None else length
    resolved = {key: _in_steps(value, key, STEPS, length) for key, value in keys.items()}
    passes = value_at(keys, "trainer.accumulate_grad_batches")
    if isinstance(value_at(keys, "trainer.val_check_interval"), str) and isinstance(passes, int):
        resolved["trainer"]["val_check_interval"] *= passes  # Lightning counts batches there
    return resolved


def _in_steps(value: Any, path: str, names: frozenset[str], length: Any) -> Any:
    """Returns a value without shares; `names` are the keys that may have one."""
    if isinstance(value, Mapping):
        below = {key: STEPS_OF_CALLBACKS if key == "callbacks" else names for key in value}
        return {key: _in_steps(item, f"{path}.{key}", below[key], length) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_steps(item, path, names, length) for item in value]
    share = _SHARE.fullmatch(value) if isinstance(value, str) and path.rpartition(".")[2] in names else None
    if share is None:
        return value
    if float(share[1]) > 100:
        raise ValueError(f"{path} is {value} of the run: expected at most 100%")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"{path} {value} is a share of trainer.max_steps, which is {length}: set it, or give steps")
    return max(1, round(length * float(share[1]) / 100))


def value_at(keys: Keys, path: str) -> Any:
    """Returns the value of a key such as ``trainer.devices``; None if the key is missing."""
    value: Any = keys
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
