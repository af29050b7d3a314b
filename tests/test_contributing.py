"""The additions that CONTRIBUTING.md prints work as printed, in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS: dict[str, str] = dict(re.findall(r"^## (Add .+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
WORKED = [heading for heading, text in SECTIONS.items() if "```diff" in text]
COPIED = ("dalle_zoo", "docs", "eval", "recipes", "tests", "tools", "model_cards", "pyproject.toml")
LARGE = ("_data", "_models")  # linked, not copied
QUICK = [
    "tests/convert/test_recognition.py",
    "tests/eval/metrics/test_base.py",
    "tests/masks/test_lines.py",
    "tests/masks/test_plan.py",
    "tests/models/test_tokenizer.py",
    "tests/planning/test_collectives.py",
    "tests/tokenizers/test_contract.py",
]
SLOW = ["tests/masks", "tests/models", "tests/sampling"]
CHOSEN = (
    "diagonal or letters or brightness or strategies_and_options or registered or tiny_dvae or page_names or diversity"
)


def blocks(text: str, language: str) -> list[str]:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return found


def new_files(text: str) -> dict[str, str]:
    """Python blocks that begin with the path of a file."""
    paths = {block: re.match(r"# (\S+/\S+\.py)\n", block) for block in blocks(text, "python")}
    return {match.group(1): block for block, match in paths.items() if match}


def usage(text: str) -> list[str]:
    """Python blocks that use what a section adds."""
    return [block for block in blocks(text, "python") if block not in new_files(text).values()]


def changed_files(text: str) -> set[str]:
    """Files that the printed diffs change."""
    return {diff.splitlines()[0].removeprefix("--- ") for diff in blocks(text, "diff")}


def apply_diff(diff: str, root: Path) -> None:
    """Changes a file as a printed diff says: each hunk must match at exactly one place."""
    header, *hunks = re.split(r"^@@\n", diff, flags=re.MULTILINE)
    name = header.removeprefix("--- ").strip()
    content = (root / name).read_text(encoding="utf-8")
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        assert content.count(before) == 1, f"{name} does not contain these lines once:\n{before}"
        content = content.replace(before, "".join(line[1:] for line in lines if line[0] in " +"))
    (root / name).write_text(content, encoding="utf-8")


TOUCHED = sorted(path for text in SECTIONS.values() for path in {*new_files(text), *changed_files(text)})


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python module or script in the copy, whose packages come first."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), str(copy / "eval")])},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with all additions of the page."""
    root = tmp_path_factory.mktemp("repository")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", *LARGE))
        else:
            shutil.copy(ROOT / name, root / name)
    for name in LARGE:
        (root / "dalle_zoo" / name).symlink_to(ROOT / "dalle_zoo" / name)
    for heading in WORKED:
        for path, content in new_files(SECTIONS[heading]).items():
            assert not (root / path).exists(), path
            (root / path).write_text(content, encoding="utf-8")
        for diff in blocks(SECTIONS[heading], "diff"):
            apply_diff(diff, root)
    return root


def test_the_page_has_worked_examples() -> None:
    kinds = {
        "an attention mask", "a text tokenizer", "an image tokenizer", "a metric", "an evaluation dataset",
        "a training strategy", "an external family",
    }  # fmt: skip
    assert {f"Add {kind}" for kind in kinds} <= set(WORKED)


@pytest.mark.parametrize("heading", WORKED)
def test_each_section_counts_its_files(heading: str) -> None:
    text = SECTIONS[heading]
    new, changed = len(new_files(text)), len(changed_files(text))
    plural = "s" if changed > 1 else ""
    assert text.lstrip().startswith(f"*{new} new file, {changed} changed file{plural}.*")


def test_ruff_accepts_the_additions(copy: Path) -> None:
    for command in (["check"], ["format", "--check"]):
        done = run(copy, "-m", "ruff", *command, "--no-cache", *TOUCHED)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow  # half a minute: the contract tests import everything once more
def test_the_contract_tests_accept_the_additions(copy: Path) -> None:
    done = run(copy, "-m", "pytest", "-v", "-p", "no:cacheprovider", *QUICK, "-k", CHOSEN)
    assert done.returncode == 0, done.stdout[-5000:]
    for name, count in {"diagonal": 3, "letters": 12, "brightness": 3, "tiny_dvae": 1, "diversity": 1}.items():
        assert len(re.findall(rf"\[{name}[\])-].* PASSED", done.stdout)) >= count, f"{name} was not tested"


@pytest.mark.slow  # half a minute: every test of masks, networks and sampling that takes registered names
def test_all_tests_of_members_accept_the_additions(copy: Path) -> None:
    done = run(copy, "-m", "pytest", "-p", "no:cacheprovider", *SLOW, "-k", CHOSEN)
    assert done.returncode == 0, done.stdout[-5000:]


def test_masks_are_listed_without_torch(copy: Path) -> None:
    script = "import sys; from dalle_zoo.cli.main import main; main(['masks']); sys.exit('torch' in sys.modules)"
    done = run(copy, "-c", script)
    assert done.returncode == 0, done.stderr
    assert "diagonal" in done.stdout


def test_the_examples_run(copy: Path) -> None:
    script = "\n".join(block for text in SECTIONS.values() for block in usage(text))
    done = run(copy, "-W", "error", "-c", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # a minute: mypy has no cache of the copy
def test_mypy_accepts_the_additions(copy: Path) -> None:
    done = run(copy, "-m", "mypy", *(path for path in TOUCHED if path.endswith(".py")))
    assert done.returncode == 0, done.stdout
