"""The packages of docs/design/architecture.md: which may import which, read from the table there."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "dalle_zoo"
EVALUATION = "dalle_zoo_eval"
OUTSIDE = {"tests", "recipes", "eval", "tools"}
EXEMPT = frozenset({(f"{PACKAGE}.cli.main", EVALUATION)})
"""Imports by string that may point up: a module, and the package of what its strings name.

The table of commands names the functions of all commands, `dalle-zoo eval` among them, so that no command imports the
others."""
COMPUTED = {"__init__.py", "cli/main.py"}
"""Files that import by a computed name: the public names and the commands, both from tables of strings in the file."""
PRIVATE: dict[str, set[str]] = {
    # Operators with plain twins, which `dalle_zoo.models.shortcuts` turns off.
    f"{PACKAGE}.models.attention.fused": {"torch.ops.aten"},
    f"{PACKAGE}.models.cpu.onednn": {"torch.ops.mkldnn"},
    # The limit of graphs has no public name.
    f"{PACKAGE}.models.attention.flex": {"torch._dynamo.config"},
    f"{PACKAGE}.models.residual": {"torch._dynamo.config"},
    # Nested arguments of an operator, as PyTorch passes them.
    f"{PACKAGE}.models.emulation": {"torch.utils._pytree.tree_map"},
    # The same functions as in PyTorch's own optimizers and gradient scaler, which have no public names.
    f"{PACKAGE}.training.optimizer": {"torch._foreach_"},
    f"{PACKAGE}.training.precision": {"torch._amp_foreach_non_finite_check_and_unscale_"},
    # What a processor computes in.
    f"{PACKAGE}.training.muon": {"torch.cpu._is_"},
}
"""Private names of PyTorch by module."""
IMPORT_SECONDS = 10.0  # of the processor, which other programs change little: several times what it takes


@dataclass(frozen=True)
class Room:
    """A row of the table: parts of equal rank and what they must not import."""

    rank: int
    forbidden: frozenset[str]


@dataclass(frozen=True)
class Import:
    """One import, anywhere in a file: also within a function, for type checking only, or by string."""

    path: Path
    line: int
    source: str  # part that imports: "masks", "registry"
    target: str  # dotted name of what is imported: a module, or a name in a module
    by_string: bool = False

    @property
    def part(self) -> str | None:
        """Part of the package that is imported; None for another package."""
        head, _, rest = self.target.partition(".")
        return rest.split(".")[0] if head == PACKAGE else None

    @property
    def exempt(self) -> bool:
        return self.by_string and any(
            module_name(self.path) == source and within(self.target, to) for source, to in EXEMPT
        )

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.source} imports {self.target}"


@cache
def rooms() -> dict[str, Room]:
    """Parts and their rows, from the table of docs/design/architecture.md."""
    rows = re.findall(
        r"^\| (\d+) \| (.+?) \| .+? \| (.*?) ?\|$",
        (ROOT / "docs/design/architecture.md").read_text(),
        re.MULTILINE,
    )
    table = {}
    for rank, where, never in rows:
        room = Room(int(rank), frozenset(re.findall(r"\w+", never)))
        for part in re.findall(r"`(\w+)(?:/|\.py)`", where):
            assert part not in table, f"{part} has two rows"
            table[part] = room
    return table


@cache
def evaluation_ranks() -> dict[str, int]:
    """Parts of the evaluation and their ranks, from its table in docs/design/architecture.md."""
    _, _, section = (ROOT / "docs/design/architecture.md").read_text().partition("### The evaluation package")
    rows = re.findall(r"^\| (\d+) \| (.+?) \| [^|]+ \|$", section.partition("\n## ")[0], re.MULTILINE)
    return {part: int(rank) for rank, where in rows for part in re.findall(r"`(\w+)(?:/|\.py)`", where)}


def evaluation_imports() -> list[tuple[Import, str, str]]:
    """Imports between two parts of the evaluation: the import, the part that imports, and the imported part."""
    paths = sorted((ROOT / "eval" / EVALUATION).rglob("*.py"))
    found = [entry for path in paths for entry in imports_of(path, module_name(path))]
    pairs = [(entry, entry.source.split(".")[1:2], (module_of(entry.target) or "").split(".")) for entry in found]
    return [
        (entry, source[0], target[1])
        for entry, source, target in pairs
        if source and target[0] == EVALUATION and len(target) > 1 and source[0] != target[1]
    ]


def part_of(path: Path) -> str:
    """Part of a file of the package: the folder or module right below its root."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


@cache
def modules() -> tuple[Path, ...]:
    return tuple(sorted((ROOT / PACKAGE).rglob("*.py")))


def module_name(path: Path) -> str:
    """Dotted name of a file of the package or of the evaluation."""
    root = ROOT / "eval" if (ROOT / "eval") in path.parents else ROOT
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


@cache
def files_by_module() -> dict[str, Path]:
    paths = [*modules(), *sorted((ROOT / "eval" / EVALUATION).rglob("*.py"))]
    return {module_name(path): path for path in paths}


def module_of(target: str) -> str | None:
    """The module that a dotted name is, or is in; None for another package."""
    name = target.replace(":", ".")
    while name and name not in files_by_module():
        name = name.rpartition(".")[0]
    return name or None


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
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        # A string that names a module of the project counts as an import: `import_module`, class paths, tables.
        name = node.value.replace(":", ".")
        if re.fullmatch(rf"({PACKAGE}|{EVALUATION})(\.\w+)+", name) and module_of(name) not in {PACKAGE, EVALUATION}:
            yield name


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but the names of entry-point groups, which are spelled like modules."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.keyword) and child.arg == "group"):
            yield from nodes(child)


def imports_of(path: Path, source: str) -> list[Import]:
    """All imports of a file."""
    return [
        Import(path, node.lineno, source, target, isinstance(node, ast.Constant))
        for node in nodes(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Constant)
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
    assert not unranked, f"give a row in docs/design/architecture.md to {sorted(unranked)}"


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
        entry
        for entry in package_imports()
        if entry.source in rooms() and entry.part and not entry.part.startswith("__")
        if entry.part not in rooms()
    ]
    fail_on(broken, "a part imports from other parts, not from the root of the package:")


def test_parts_of_the_evaluation_have_ranks_and_import_downwards() -> None:
    ranks = evaluation_ranks()
    parts = {path.stem for path in (ROOT / "eval" / EVALUATION).iterdir() if path.suffix == ".py" or path.is_dir()}
    assert {part for part in parts if not part.startswith("_")} == set(ranks)
    assert len(evaluation_imports()) > 100
    broken = [entry for entry, source, target in evaluation_imports() if ranks[target] > ranks[source]]
    fail_on(broken, "a part of the evaluation may import only parts of its own rank or below:")


def test_parts_of_the_evaluation_form_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for _, source, target in evaluation_imports():
        graph.setdefault(source, set()).add(target)
    assert graph["opening"] >= {"extractors", "generation", "protocol"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_modules_form_no_circle() -> None:
    """Not even by a late import, by an import for type checking, or by string."""
    graph: dict[str, set[str]] = {}
    for source, path in files_by_module().items():
        for entry in imports_of(path, source):
            target = module_of(entry.target)
            # The version is in the root of the package, which knows its public names by string.
            if target not in {None, source} and not entry.exempt and entry.target != f"{PACKAGE}.__version__":
                graph.setdefault(source, set()).add(str(target))
    assert graph[f"{PACKAGE}.models.prior"] >= {f"{PACKAGE}.models.decoding", f"{PACKAGE}.models.attention"}
    assert f"{PACKAGE}.pipeline" in graph[PACKAGE], "by string"
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_exemptions_are_needed() -> None:
    entries = [entry for path in files_by_module().values() for entry in imports_of(path, "")]
    for source, to in EXEMPT:
        assert any(
            entry.exempt and module_name(entry.path) == source and within(entry.target, to) for entry in entries
        ), f"{source} names nothing of {to} any more: remove the exemption"


def test_names_of_imports_are_not_computed() -> None:
    """Or the checks here would not see them."""
    computed = {
        str(path.relative_to(ROOT / PACKAGE))
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {"import_module", "__import__"}
        if not (node.args and isinstance(node.args[0], ast.Constant))
    }
    assert computed == COMPUTED


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
    fail_on(broken, "docs/design/architecture.md forbids:")


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private names of PyTorch in a file, and operators that are called without their public function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = [name] if re.fullmatch(r"torch(\.\w+)+", name := ast.unparse(node)) else []
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [name for name in targets(node, ROOT / PACKAGE / "x.py") if name.startswith("torch.")]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[1] == "ops" or any(part.startswith("_") and not part.startswith("__") for part in parts):
                yield name


def test_private_names_of_pytorch_are_few_and_known() -> None:
    found: dict[str, set[str]] = {}
    for source, path in files_by_module().items():
        for name in private_names(ast.parse(path.read_text())):
            kind = next((known for known in PRIVATE.get(source, {}) if name.startswith(known)), name)
            if not any(other.startswith(f"{name}.") for other in PRIVATE.get(source, {})):  # a part of a known name
                found.setdefault(source, set()).add(kind)
    assert found == {source: set(known) for source, known in PRIVATE.items()}, "call a public function instead"


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("torch.ops.aten.mm(x, y)", {"torch.ops.aten.mm", "torch.ops.aten", "torch.ops"}),
        ("from torch._inductor import config", {"torch._inductor.config"}),
        ("import torch._dynamo", {"torch._dynamo"}),
        ("torch.nn.functional.linear(x, y); torch.__version__; x._version", set()),
    ],
)
def test_private_names_are_found(statement: str, expected: set[str]) -> None:
    assert set(private_names(ast.parse(statement))) == expected


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
    broken = [entry for entry in package_imports() if entry.target.split(".")[0] in OUTSIDE | {EVALUATION}]
    broken = [entry for entry in broken if not entry.exempt]
    fail_on(broken, "the library imports neither scripts, recipes, tests nor evaluation code:")


def test_only_tests_import_tests() -> None:
    paths = [path for folder in ("eval", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert paths
    broken = [
        entry
        for path in paths
        for entry in imports_of(path, path.relative_to(ROOT).parts[0])
        if entry.target.split(".")[0] in OUTSIDE - {entry.source}
    ]
    fail_on(broken, "evaluation code and tools import installed packages, and each other within a folder:")


@pytest.mark.parametrize(
    ("statement", "where", "expected"),
    [
        ("import dalle_zoo.masks.plan as p", "models/x.py", ["dalle_zoo.masks.plan"]),
        ("from dalle_zoo import hub, zoo", "cli/x.py", ["dalle_zoo.hub", "dalle_zoo.zoo"]),
        ("from ..training import base", "models/x.py", ["dalle_zoo.training.base"]),
        ("from . import layers", "models/x.py", ["dalle_zoo.models.layers"]),
        ("from dalle_zoo.masks.plan import Mask", "models/x.py", ["dalle_zoo.masks.plan.Mask"]),
        ("def f():\n    import lightning.pytorch", "zoo.py", ["lightning.pytorch"]),
        ("if TYPE_CHECKING:\n    from dalle_zoo import zoo", "x.py", ["dalle_zoo.zoo"]),
        ("def f():\n    return import_module('dalle_zoo.zoo')", "x.py", ["dalle_zoo.zoo"]),
        ("COMMANDS = {'fit': 'dalle_zoo.zoo:find_model'}", "x.py", ["dalle_zoo.zoo.find_model"]),
        ("Registry('mask', group='dalle_zoo.masks')", "x.py", []),
        ("log('dalle_zoo.nothing')", "x.py", []),
    ],
)
def test_imports_are_found_and_spelled_out(statement: str, where: str, expected: list[str]) -> None:
    path = ROOT / PACKAGE / where
    found = [name for node in nodes(ast.parse(statement)) for name in targets(node, path)]
    assert found == expected


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.models"])
def test_import_is_light_and_silent(module: str) -> None:
    heavy = "{'lightning', 'pytorch_lightning', 'transformers', 'matplotlib', 'webdataset'}"
    script = f"import sys, {module}; sys.exit(', '.join({heavy} & set(sys.modules)) or None)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < IMPORT_SECONDS
