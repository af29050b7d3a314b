"""The rooms of docs/architecture.md: who may import whom, read from the table there."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "dalle_zoo"
OUTSIDE = {"tests", "recipes", "eval", "tools"}
IMPORT_SECONDS = 15.0  # many times what it takes, so that only a heavy import fails on a busy machine


@dataclass(frozen=True)
class Room:
    """A row of the table: parts of equal rank and what they must not import."""

    rank: int
    forbidden: frozenset[str]


@dataclass(frozen=True)
class Import:
    """One import of a native module, wherever in the file it stands."""

    path: Path
    line: int
    source: str  # part that imports: "masks", "registry"
    target: str  # dotted name of what is imported

    @property
    def part(self) -> str | None:
        """Part of ours that is imported, None for another package."""
        head, _, rest = self.target.partition(".")
        return rest.split(".")[0] if head == PACKAGE else None

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.source} imports {self.target}"


@cache
def rooms() -> dict[str, Room]:
    """Parts and their rows, from the table of docs/architecture.md."""
    rows = re.findall(
        r"^\| (\d+) \| (.+?) \| .+? \| (.*?) ?\|$",
        (ROOT / "docs/architecture.md").read_text(),
        re.MULTILINE,
    )
    table = {}
    for rank, where, never in rows:
        room = Room(int(rank), frozenset(re.findall(r"\w+", never)))
        for part in re.findall(r"`(\w+)(?:/|\.py)`", where):
            assert part not in table, f"{part} has two rows"
            table[part] = room
    return table


def part_of(path: Path) -> str:
    """Part of a file of the package: the folder or module right below its root."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


@cache
def modules() -> tuple[Path, ...]:
    return tuple(sorted((ROOT / PACKAGE).rglob("*.py")))


def targets(node: ast.AST, path: Path) -> Iterator[str]:
    """Dotted names that a node imports; relative ones are spelled out."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = path.parent.relative_to(ROOT).parts
            above = package[: len(package) - node.level + 1]
            base = ".".join((*above, *filter(None, [base])))
        # `from dalle_zoo import masks` imports the part, not a name of the root
        yield from (f"{base}.{a.name}" if base == PACKAGE else base for a in node.names)


def imports_of(path: Path, source: str) -> list[Import]:
    """All imports of a file, those inside functions too."""
    return [
        Import(path, node.lineno, source, target)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for target in targets(node, path)
    ]


@cache
def package_imports() -> tuple[Import, ...]:
    return tuple(entry for path in modules() for entry in imports_of(path, part_of(path)))


def within(target: str, name: str) -> bool:
    return target == name or target.startswith(f"{name}.")


def fail_on(broken: list[Import], rule: str) -> None:
    assert not broken, "\n".join([rule, *map(str, broken)])


def test_the_check_covers_the_package() -> None:
    covered = {part_of(path) for path in modules()} & set(rooms())
    assert len(modules()) >= 20
    assert len([entry for entry in package_imports() if entry.part]) >= 40
    assert {"registry", "masks", "models", "training"} <= covered
    assert len({room.rank for room in rooms().values()}) >= 8


def test_every_part_has_a_rank() -> None:
    unranked = {part_of(path) for path in modules()} - set(rooms()) - {"__init__", "__main__"}
    assert not unranked, f"give a row in docs/architecture.md to {sorted(unranked)}"


def test_imports_point_down() -> None:
    table = rooms()
    broken = [
        entry
        for entry in package_imports()
        if entry.source in table and entry.part in table and table[entry.part].rank > table[entry.source].rank
    ]
    fail_on(broken, "a part may import only parts of its own rank or below:")


def test_parts_import_from_where_a_thing_lives() -> None:
    broken = [
        entry for entry in package_imports() if entry.source in rooms() and entry.part and entry.part not in rooms()
    ]
    fail_on(broken, "a part imports from other parts, not from the root of the package:")


def test_parts_of_one_rank_form_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for entry in package_imports():
        if entry.part in rooms() and entry.part != entry.source and entry.source in rooms():
            graph.setdefault(entry.source, set()).add(str(entry.part))
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_what_the_table_forbids_is_not_imported() -> None:
    broken = [
        entry
        for entry in package_imports()
        for name in (rooms()[entry.source].forbidden if entry.source in rooms() else ())
        if within(entry.target, name) or within(entry.target, f"{PACKAGE}.{name}")
    ]
    fail_on(broken, "docs/architecture.md forbids:")


def test_lightning_stays_in_training_and_cli() -> None:
    users = [
        entry
        for entry in package_imports()
        if within(entry.target, "lightning") or within(entry.target, "pytorch_lightning")
    ]
    assert users, "training imports lightning: finding none means that the check is broken"
    fail_on(
        [entry for entry in users if entry.source not in {"training", "cli"}],
        "lightning belongs in training and cli:",
    )


def test_the_library_imports_no_script_and_no_evaluation() -> None:
    broken = [entry for entry in package_imports() if entry.target.split(".")[0] in OUTSIDE | {"dalle_zoo_eval"}]
    fail_on(broken, "the library imports neither scripts, recipes, tests nor evaluation code:")


def test_only_tests_import_tests() -> None:
    paths = [path for folder in ("eval", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert paths
    broken = [
        entry
        for path in paths
        for entry in imports_of(path, path.relative_to(ROOT).parts[0])
        if entry.target.split(".")[0] in OUTSIDE - {path.relative_to(ROOT).parts[0]}  # a tool may import a tool
    ]
    fail_on(broken, "evaluation code and tools import installed packages and their own folder only:")


@pytest.mark.parametrize(
    ("statement", "where", "expected"),
    [
        ("import dalle_zoo.masks.plan as p", "models/x.py", ["dalle_zoo.masks.plan"]),
        ("from dalle_zoo import hub, zoo", "cli/x.py", ["dalle_zoo.hub", "dalle_zoo.zoo"]),
        ("from ..training import base", "models/x.py", ["dalle_zoo.training"]),
        ("from . import layers", "models/x.py", ["dalle_zoo.models"]),
        ("def f():\n    import lightning.pytorch", "hub.py", ["lightning.pytorch"]),
    ],
)
def test_imports_are_found_and_spelled_out(statement: str, where: str, expected: list[str]) -> None:
    path = ROOT / PACKAGE / where
    found = [name for node in ast.walk(ast.parse(statement)) for name in targets(node, path)]
    assert found == expected


def test_import_is_light_and_silent() -> None:
    heavy = "{'lightning', 'pytorch_lightning', 'transformers', 'matplotlib', 'webdataset'}"
    script = f"import sys, {PACKAGE}; sys.exit(', '.join({heavy} & set(sys.modules)) or None)"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - start
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert seconds < IMPORT_SECONDS
