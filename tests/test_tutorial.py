"""The notebooks of docs/tutorial: they run, in order, and each of their plots appears."""

from __future__ import annotations

import ast
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dalle_zoo.zoo import DEFAULT_MODEL

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs/tutorial").glob("[1-9]-*.md"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
MINUTES = 20
"""Longest time of a notebook on a busy machine; on an idle one it takes one to three minutes."""


def cells(path: Path) -> list[str]:
    """Code cells of a notebook, which are the Python blocks of its source."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_there_are_five_notebooks_that_lead_to_each_other() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4", "5"]
    for path, following in itertools.pairwise(NOTEBOOKS):
        assert f"]({following.name})" in path.read_text("utf-8"), f"{path.name} does not lead to {following.name}"


@EACH
def test_the_cells_are_short_python(path: Path) -> None:
    assert len(cells(path)) >= 8
    for cell in cells(path):
        ast.parse(cell)
        assert len(cell.splitlines()) <= 40, "a cell shows one idea"


@EACH
def test_the_notebook_does_not_depend_on_which_model_is_bundled(path: Path) -> None:
    assert not re.search(rf'(from_pretrained|load_model)\("{DEFAULT_MODEL}"', path.read_text("utf-8"))


@EACH
@pytest.mark.slow  # one to three minutes each
def test_the_notebook_runs(path: Path, tmp_path: Path) -> None:
    import jupytext
    import nbformat

    notebook: Any = jupytext.read(path, fmt="md")
    file = tmp_path / f"{path.stem}.ipynb"
    jupytext.write(notebook, file)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--nbmake", f"--nbmake-timeout={60 * MINUTES}", "--overwrite"),
            *("-c", os.devnull, "--rootdir", str(tmp_path), str(file)),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    ran = nbformat.read(file, as_version=4)
    outputs = [output for cell in ran.cells if cell.cell_type == "code" for output in cell.outputs]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) >= 4
