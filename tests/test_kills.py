"""Commands that are killed at random moments; `make kills` does the same more often."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

KILLS = 52


@pytest.mark.slow
def test_killed_commands_lose_nothing(tmp_path: Path) -> None:
    run_trials = runpy.run_path(str(Path(__file__).parents[1] / "tools/kill_commands.py"))["run_trials"]
    counts, failures = run_trials(KILLS, 0, None, tmp_path)
    assert failures == []
    assert counts.total() >= KILLS
    assert min(counts.values()) > 0, counts
