"""What README.md shows: its commands exist, its program runs, its counts are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
COUNTED = 0.1
"""Relative error of a rounded count."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"^make ([\w-]+)", "\n".join(blocks("sh")), re.MULTILINE)
    targets += re.findall(r"`make ([\w-]+)`", README)
    assert "demo" in targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_program_has_five_lines_after_its_imports() -> None:
    (program,) = blocks("python")
    lines = [line for line in program.splitlines() if line.strip()]
    assert len(lines) <= 5


@pytest.mark.slow  # generates 16 images: seconds on an idle machine
def test_the_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (program,) = blocks("python")
    exec(program, {})
    with Image.open("apple.png") as image:
        assert image.size == (64, 64)


def test_the_table_compares_with_five_systems() -> None:
    (table,) = re.findall(r"^\| \| dalle-zoo \|.*?\n\n", README, re.MULTILINE | re.DOTALL)
    rows = [row.strip("|").split("|") for row in table.strip().splitlines()]
    assert [cell.strip() for cell in rows[0][2:]] == [
        "DALLE-pytorch",
        "minDALL-E",
        "ruDALL-E",
        "DALL-E mini",
        "OpenAI",
    ]
    assert all(len(row) == 7 and all(cell.strip() for cell in row[1:]) for row in rows)
    (tests,) = (row for row in rows if row[0].strip() == "test files")
    assert int(tests[1]) == pytest.approx(len(list((ROOT / "tests").rglob("test_*.py"))), rel=COUNTED)
