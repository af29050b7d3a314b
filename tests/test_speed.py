"""docs/design/speed.md: its tables are the stored figures, and whatever misses its aim says why."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    """A script of benchmarks/, imported."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


report, harness = script("report"), script("harness")
RESULTS: list[dict[str, Any]] = report.read_results()


def test_the_page_is_what_the_results_say() -> None:
    page = (ROOT / "docs/design/speed.md").read_text(encoding="utf-8")
    assert report.render(page, RESULTS) == page, "run python benchmarks/report.py"
    outside = re.sub(r"<!-- [\w-]+ -->.*?<!-- end -->", "", page, flags=re.DOTALL)
    assert not re.search(r"\d\s?(x\b|%|ms\b|times\b)", outside), "figures belong in the tables"


def test_every_result_is_of_the_harness() -> None:
    assert RESULTS
    for result in RESULTS:
        for row in result["rows"]:
            harness.Row(**{**row, "equal": tuple(harness.Equality(**check) for check in row["equal"])})
            if row.get("unit", "seconds") == "seconds":
                assert all(len(times) >= harness.ROUNDS for times in row["seconds"].values()), row["name"]
            assert {row["path"], row["against"]} <= set(row["seconds"])


def test_what_falls_short_says_why() -> None:
    silent = [
        f"{result['benchmark']}: {row['name']}"
        for result in RESULTS
        for row in result["rows"]
        if row["target"] is not None and row["ratio"] < row["target"] and not row["note"]
    ]
    assert not silent, silent


def test_plots_are_there() -> None:
    named = re.findall(
        r"\]\(\.\./\.\./(benchmarks/results/speed/[\w./-]+\.png)\)", (ROOT / "docs/design/speed.md").read_text()
    )
    assert named
    assert all((ROOT / path).is_file() for path in named)


def test_paths_are_timed_in_turn() -> None:
    calls: list[str] = []
    seconds = harness.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_a_failed_check_gives_no_row() -> None:
    with pytest.raises(AssertionError, match=r"difference is 0\.2, expected at most 0\.1"):
        harness.Equality(what="difference", value=0.2, limit=0.1)
    with pytest.raises(AssertionError, match="difference is nan"):
        harness.Equality(what="difference", value=float("nan"), limit=0.1)


def test_a_stored_result_reads_back(tmp_path: Path) -> None:
    row = harness.compare(
        "nothing", {"ours": lambda: None, "theirs": lambda: sum(range(10_000))}, path="ours", against="theirs",
        target=1e9, equal=(harness.Equality(what="difference", value=0.0, limit=0.0),), note="it is nothing",
    )  # fmt: skip
    path = harness.store("nothing", "python nothing.py", [row], out=tmp_path / "nothing_cpu1.json")
    result = json.loads(path.read_text())
    assert result["load"] >= 0
    table = report.table([result])
    assert re.search(r"\| nothing \[1\] \| theirs \| float32 \| .* \| \*\*[\d.]+\*\* \| 1e\+09 \|", table)
    assert table.endswith("[1] it is nothing")
