"""What README.md shows: its commands exist, its program runs, its figures are the stored ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.tags import Tag
from PIL import Image

from benchmarks import fresh_machine
from dalle_zoo import DallePipeline
from dalle_zoo.files import read_json
from dalle_zoo.zoo import DEFAULT_MODEL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


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
        assert image.size == DallePipeline.from_pretrained(DEFAULT_MODEL).image_size


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


def test_the_table_of_a_fresh_machine_is_measured() -> None:
    assert fresh_machine.table(read_json(fresh_machine.RESULT)) in README, "run python -m benchmarks.fresh_machine"


def test_the_downloads_are_measured() -> None:
    assert fresh_machine.sentence(read_json(fresh_machine.RESULT)["downloads"]) in README


def test_the_wheel_of_the_running_python_is_counted() -> None:
    tags = [Tag("cp311", "cp311", "manylinux_2_28_x86_64"), Tag("py3", "none", "any")]
    wheels = {"cp311-cp311-manylinux_2_28_x86_64": 2, "py3-none-any": 3, "cp312-cp312-manylinux_2_28_x86_64": 4}
    listed = [{"url": f"https://host/a-1%2Bcpu-{tag}.whl", "size": size} for tag, size in wheels.items()]
    assert fresh_machine.wheel_size(listed, tags) == 2
    assert fresh_machine.wheel_size(listed[2:], tags) is None


def test_versions_of_the_compared_packages_are_those_that_were_measured() -> None:
    required = (ROOT / "benchmarks/requirements-peers.txt").read_text("utf-8")
    shown = {"dalle-pytorch": "DALLE-pytorch", "rudalle": "ruDALL-E", "min-dalle": "min-dalle", "DALL-E": "DALL-E"}
    for package, title in shown.items():
        (version,) = re.findall(rf"^{package}==(.+)$", required, re.MULTILINE)
        assert re.search(rf"[ ,]{title} {re.escape(version)}[,.]", README), title


def test_the_tutorial_has_five_notebooks() -> None:
    assert "five notebooks" in README
    assert len(list((ROOT / "docs/tutorial").glob("[1-9]-*.md"))) == 5
