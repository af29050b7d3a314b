"""``make gpu-check``: stages that fail, crash or hang leave their findings, and a rehearsal runs all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check.check import Check, Entry, run_stage, store
from benchmarks.gpu_check.summary import render

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

ROOT = Path(__file__).parents[1]


def good(check: Check) -> None:
    check.add("half", 0.5, "of it", least=0.4, details_of="it")
    check.add("too | little", 0.1, "of it", least=0.4)


def failing(check: Check) -> None:
    def wrong(number: int) -> None:
        raise ValueError(f"no {number}\nand a second line")

    check.each([partial(wrong, 3), lambda: check.add("after it", 1.0, "figure")])


def raising(check: Check) -> None:
    check.add("before", 1.0, "figure")
    raise RuntimeError("out of memory")


def dying(check: Check) -> None:
    check.add("before", 1.0, "figure")
    os._exit(11)


def hanging(check: Check) -> None:
    check.add("before", 1.0, "figure")
    time.sleep(100)


def outcome(stage: Callable[[Check], None], seconds: float = 30.0) -> dict[str, Any]:
    found: dict[str, Any] = {}
    entry = Entry(run=stage, limit=seconds, about="A stage")
    run_stage("stage", entry, {"device": "cpu", "tiny": True, "limits": {}}, seconds, lambda: None, found)
    return found


def test_findings_have_their_verdict() -> None:
    found = outcome(good)
    assert found["status"] == "done"
    assert [(f["passed"], f["wanted"]) for f in found["findings"]] == [(True, "at least 0.4"), (False, "at least 0.4")]
    assert found["findings"][0]["details"] == {"details_of": "it"}


def test_a_part_that_fails_does_not_stop_the_others() -> None:
    found = outcome(failing)
    assert found["status"] == "done"
    assert [error["error"] for error in found["errors"]] == ["wrong 3: ValueError: no 3 and a second line"]
    assert [finding["name"] for finding in found["findings"]] == ["after it"]


@pytest.mark.parametrize(
    ("stage", "seconds", "status"),
    [
        (raising, 30.0, "ended with exit status 1"),
        (dying, 30.0, "ended with exit status 11"),
        (hanging, 1.0, "stopped"),
    ],
)
def test_stages_that_end_early_leave_what_they_measured(
    stage: Callable[[Check], None], seconds: float, status: str
) -> None:
    start = time.monotonic()
    found = outcome(stage, seconds)
    assert time.monotonic() - start < 30
    assert found["status"].startswith(status)
    assert [finding["name"] for finding in found["findings"]] == ["before"]


def test_results_and_summary(tmp_path: Path) -> None:
    result = {
        "command": "python -m benchmarks.gpu_check", "device": "cpu", "tiny": True, "torch": "2", "cuda": None,
        "dalle_zoo": "0", "date": "today", "seconds": 3.0,
        "stages": {"good": outcome(good), "failing": outcome(failing), "later": {"status": "not reached"}},
    }  # fmt: skip
    store(tmp_path, result, render(result))
    assert json.loads((tmp_path / "gpu-check.json").read_text())["stages"]["good"]["status"] == "done"
    page = (tmp_path / "gpu-check.md").read_text()
    assert "1 of 2 figures are as wanted, 1 errors." in page
    assert "| half | 0.5 of it | at least 0.4 | yes |" in page
    assert "| too \\| little | 0.1 of it | at least 0.4 | **no** |" in page
    assert "- wrong 3: ValueError: no 3 and a second line" in page
    assert "| later | not reached | 0 |" in page


@pytest.mark.slow
def test_a_rehearsal_runs_every_stage(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--tiny", "--seconds", "1800"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, check=False)
    stages = json.loads((tmp_path / "gpu-check.json").read_text())["stages"]
    assert {name: (stage["status"], stage["errors"]) for name, stage in stages.items()} == {
        name: ("done", []) for name in stages
    }
    assert all(stage["findings"] for stage in stages.values())
    assert done.returncode == 0
