"""The repository's documents and shipped files agree with each other."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tarfile
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if "generated" not in path.parts
)
SPRITES = ROOT / "dalle_zoo/_data/sprites64"
# Folders of this repository: a word in backticks that begins with one must be a path that exists.
FOLDERS = ("dalle_zoo", "docs", "eval", "model_cards", "recipes", "tests", "tools")
# Built from parts, so that this file does not hold what it looks for.
MACHINE_PATHS = [f"/{name}/" for name in ("work", "home", "root", "Users", "mnt", "scratch")]


@cache
def manifest() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((SPRITES / "manifest.json").read_text())
    return read


def committed() -> list[Path]:
    """Files that git tracks or would track; all but caches where this is no git checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_documents_exist(document: Path) -> None:
    text = document.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    links = {
        (document.parent / target).resolve()
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose)
        if "://" not in target and not target.startswith("mailto:")
        if "generated/" not in target  # pages that `make docs` writes, and whose links it checks
    }
    words = re.findall(r"`([\w./-]+)`", prose)
    named = {ROOT / word for word in words if word.split("/")[0] in FOLDERS and "/" in word}
    missing = sorted(str(path) for path in links | named if not path.exists())
    assert not missing, f"{document.name} names files that do not exist"


def anchors(document: Path) -> set[str]:
    """Anchors of the headings of a Markdown file, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*?) *$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_anchors_of_links_exist(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", document.read_text())
    missing = [
        f"{target}#{anchor}"
        for target, anchor in links
        if "generated/" not in target
        if anchor not in anchors((document.parent / target).resolve() if target else document)
    ]
    assert not missing, f"{document.name} links to headings that do not exist"


def test_contributing_lists_every_group_of_entry_points() -> None:
    sources = [*(ROOT / "dalle_zoo").rglob("*.py"), *(ROOT / "eval/dalle_zoo_eval").rglob("*.py")]
    calls = [re.findall(r'Registry(?:\[.*\])?\(\s*"[^"]+", group="([^"]+)"', path.read_text()) for path in sources]
    groups = {group for found in calls for group in found} - {"example.things"}
    listed = re.findall(r"^\| `(dalle_zoo\.\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    assert len(groups) > 10
    assert sorted(listed) == sorted(groups)


def test_the_documents_are_all_there() -> None:
    names = {path.name for path in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "THIRD_PARTY_NOTICES.md"} <= names


def test_no_committed_file_names_a_machine() -> None:
    pattern = re.compile("|".join(rf"(?<![\w.>}}]){re.escape(path)}" for path in MACHINE_PATHS))
    files = committed()
    assert len(files) > 20
    found = []
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # images, shards, weights
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(lines, 1)
            if pattern.search(line)
        ]
    assert not found, "\n".join(found)


def test_no_committed_file_is_a_pickle() -> None:
    endings = {".ckpt", ".pkl", ".pickle", ".pt", ".pth", ".bin"}
    assert [path for path in committed() if path.suffix in endings] == []


def test_the_notice_names_every_source_of_the_images() -> None:
    notice = (ROOT / "THIRD_PARTY_NOTICES.md").read_text()
    assert manifest()["sources"]
    for source in manifest()["sources"].values():
        row = next((line for line in notice.splitlines() if str(source["npm"]) in line), "")
        assert row, f"{source['npm']} has no row"
        for fact in ("caption_word", "license", "credit"):
            assert str(source[fact]) in row
    assert "rasterized and scaled" in notice


def test_the_manifest_describes_the_shipped_sprites() -> None:
    records = [json.loads(line) for line in (SPRITES / "sprites.jsonl").read_text("utf-8").splitlines()]
    for name, digest in manifest()["files"].items():
        assert hashlib.sha256((SPRITES / name).read_bytes()).hexdigest() == digest
    with tarfile.open(SPRITES / "sprites.tar") as tar:
        assert tar.getnames() == [f"{record['key']}.webp" for record in records]
    assert Counter(record["split"] for record in records) == manifest()["splits"]
    assert len({record["thing"] for record in records}) == manifest()["things"]
    notice = (ROOT / "THIRD_PARTY_NOTICES.md").read_text()
    for style, count in Counter(record["style"] for record in records).items():
        assert re.search(rf"^\| {style} \|.*\| {count:,} \|", notice, re.MULTILINE), style


def test_the_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    source = (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text()
    assert len(re.findall(r'^__version__ = "\d+\.\d+\.\d+"', source, re.MULTILINE)) == 1


def test_ci_runs_what_people_run() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111, "chmod +x .ci/run"
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make chromium", "make test"]


def test_the_prompt_of_make_demo_is_never_an_option(tmp_path: Path) -> None:
    command = tmp_path / "bin/dalle-zoo"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    done = subprocess.run(
        ["make", "-s", "-o", f"{tmp_path}/.demo", "demo", f"VENV={tmp_path}", "PROMPT=--help it's $HOME"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["demo", "--", "--help it's $HOME"], done.stderr
