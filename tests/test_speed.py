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
peers = report.peers  # the tables of the comparison with other packages
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


def comparison(seconds: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    """A stored comparison with one row."""
    row = {"name": "16 images of one prompt", "unit": "image tokens/s", "amount": 32, "dtype": "float32"}
    return {
        "shape": "S", "title": "S", "command": "make bench-peers", "device": "a CPU", "cores": 2, "load": 0.5,
        "torch": "2.11", "date": "2026-11-30", "systems": {}, "repairs": {"package": ["repaired"]},
        "rows": [{**row, "seconds": seconds, "errors": {}, **more}],
    }  # fmt: skip


def test_the_fastest_package_is_bold_and_the_floor_is_not() -> None:
    table = peers.table(comparison({"floor": [1.0], "dalle-zoo": [4.0, 2.0, 8.0], "slow": [16.0], "fast": [1.6]}))
    assert "| 32 | 8 | 2 | **20** | 0.40 |" in table


def test_own_prompts_are_a_row_of_their_own() -> None:
    table = peers.table(comparison({"dalle-zoo": [2.0], "other": [4.0], "dalle-zoo, own prompts": [8.0]}))
    assert "16 images of one prompt, image tokens/s | float32 | – | **16** | 8 | 2.00 |" in table
    assert "16 images of 16 prompts, image tokens/s | float32 | – | 4 | **8** | 0.50 |" in table


def test_a_package_that_fails_is_reported_with_its_error() -> None:
    table = peers.table(comparison({"dalle-zoo": [2.0]}, errors={"other": "ImportError: no module"}))
    assert "| **16** | failed [1] | – |" in table
    assert "[1] other: ImportError: no module" in table


def test_what_was_not_compared_yet_is_named() -> None:
    assert 'Not measured yet: `make bench-peers BENCH="--shapes M dvae"`.' in peers.render([comparison({})])
    assert peers.render([]) == ['Not measured yet: `make bench-peers BENCH="--shapes S M dvae"`.']


def test_a_row_in_which_dalle_zoo_fails_is_rendered() -> None:
    table = peers.table(comparison({"other": [2.0]}, errors={"dalle-zoo": "RuntimeError: no"}))
    assert "| failed [1] | **16** | – |" in table
    assert "[1] dalle-zoo: RuntimeError: no" in table


def test_benchmarks_of_a_cpu_have_no_option_for_the_device() -> None:
    main = script("__main__")
    for name in main.SCRIPTS:
        text = (ROOT / f"benchmarks/{name}.py").read_text(encoding="utf-8")
        assert ('"--device"' in text) == (name not in main.CPU_ONLY), name


def test_placeholders_replace_only_modules_that_are_absent() -> None:
    repairs = importlib.import_module("benchmarks.peers.repairs")
    finder = repairs.Placeholders()
    assert finder.find_spec("json") is None
    spec = finder.find_spec("youtokentome")
    module = finder.create_module(spec)
    with pytest.raises(RuntimeError, match=r"youtokentome\.BPE is a placeholder"):
        module.BPE("file")
