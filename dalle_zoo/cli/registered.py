"""Lists the members of a registry from its source, without importing them.

Importing strategies or metrics loads Lightning or torch, which takes seconds. Their names and the first lines of their
docstrings are in the source, next to ``REGISTRY.register(name)``.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Where the members of a registry are registered."""

    place: str
    """Module or package, below a package that need not be imported."""
    registry: str
    """Name of the registry in the source."""
    what: str
    """What the members are, for people."""


SOURCES = {
    "masks": Source("dalle_zoo/masks", "MASKS", "attention masks: model.config.masks"),
    "tokenizers": Source("dalle_zoo/tokenizers", "TEXT_TOKENIZERS", "text tokenizers: data.text.tokenizer"),
    "strategies": Source("dalle_zoo/training/strategies", "STRATEGIES", "strategies: trainer.strategy"),
    "precisions": Source("dalle_zoo/training/precision.py", "PRECISIONS", "precisions: trainer.precision"),
    "schedules": Source("dalle_zoo/training/schedules.py", "DECAYS", "schedules: model.learning_rate.decay"),
    "metrics": Source("dalle_zoo_eval/metrics", "METRICS", "metrics of `dalle-zoo eval`"),
}


def members(kind: str) -> dict[str, str]:
    """Returns the names of a registry with the first lines of their docstrings, also those of other distributions.

    Args:
        kind: A key of `SOURCES`.
    """
    source = SOURCES[kind]
    root = importlib.util.find_spec(source.place.partition("/")[0])
    assert root is not None
    assert root.origin is not None
    place = Path(root.origin).parent.parent / source.place
    files = [place] if place.suffix else sorted(place.glob("*.py"))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    documented = {
        node.name: (ast.get_docstring(node) or "").partition("\n")[0]
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    found = {name: documented[member] for tree in trees for name, member in _registered(tree, source.registry)}
    group = next(group for tree in trees for group in _groups(tree, source.registry))
    for point in importlib.metadata.entry_points(group=group):
        found.setdefault(point.name, f"of another distribution: {point.value}")
    return dict(sorted(found.items()))


def _registered(tree: ast.Module, registry: str) -> Iterator[tuple[str, str]]:
    """Yields registered names and the names of their functions or classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for decorator in node.decorator_list:
                yield from ((name, node.name) for name in _name(decorator, registry))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Name):
            yield from ((name, node.args[0].id) for name in _name(node.func, registry))


def _name(call: ast.expr, registry: str) -> Iterator[str]:
    """Yields the name in ``REGISTRY.register(name, ...)``."""
    if isinstance(call, ast.Call) and ast.unparse(call.func) == f"{registry}.register":
        yield str(ast.literal_eval(call.args[0]))


def _groups(tree: ast.Module, registry: str) -> Iterator[str]:
    """Yields the entry-point group in ``REGISTRY = Registry(..., group=group)``."""
    for node in tree.body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if [ast.unparse(target) for target in targets] == [registry]:
            call = getattr(node, "value", None)
            assert isinstance(call, ast.Call), "a registry is constructed where it is named"
            yield from (str(ast.literal_eval(keyword.value)) for keyword in call.keywords if keyword.arg == "group")
