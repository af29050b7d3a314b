"""What is published: the checks of the distributions, the container, and the files that a forge reads."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from dalle_zoo.cli.main import COMMANDS, main
from dalle_zoo.version import __version__
from tools import release

ROOT = Path(__file__).parents[1]
CONTAINER = (ROOT / "Containerfile").read_text("utf-8")
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[0-9]*.yml"))


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


# ------------------------------------------------------------ distributions


@pytest.mark.slow  # builds both distributions, installs the wheel, generates and trains: a minute
def test_the_distributions_are_fit_to_be_published(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.release", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.suffix for path in tmp_path.iterdir()} == {".whl", ".gz"}
    assert len(done.stdout.splitlines()) == 11


def test_files_of_the_wheel_follow_from_those_of_the_repository() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    files = ["dalle_zoo/zoo.py", "recipes/dvae/tiny.yaml", "eval/dalle_zoo_eval/blur.py", "tests/test_zoo.py"]
    names = release.wheel_names(
        [*files, "eval/results/composition.json"], settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    )
    expected = {"dalle_zoo/zoo.py", "dalle_zoo/_recipes/dvae/tiny.yaml", "dalle_zoo_eval/blur.py"}
    assert names == expected | {"dalle_zoo/_results/composition.json"}


def test_missing_and_surplus_files_are_refused() -> None:
    with pytest.raises(release.CheckError, match=r"the wheel lacks 1 files: b"):
        release.difference("the wheel", {"a"}, {"a", "b"})
    with pytest.raises(release.CheckError, match=r"the wheel has in addition 1 files: notes\.txt"):
        release.difference("the wheel", {"a", "notes.txt"}, {"a"})


def test_a_distribution_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "large.whl"
    file.write_bytes(b"12345")
    assert release.check_size(file) == "0.0 MB, of at most 100 MB"
    monkeypatch.setattr(release, "LARGEST", 5)
    with pytest.raises(release.CheckError, match=r"large\.whl has"):
        release.check_size(file)


def test_every_requirement_has_a_floor_that_test_lowest_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    required = [Requirement(line) for line in lines]
    named = [one for one in required if one.name not in ("dalle-zoo", "torchvision")]  # itself; follows torch
    assert len(named) > 30
    assert [one.name for one in named if not any(part.operator == ">=" for part in one.specifier)] == []
    assert "--resolution lowest-direct" in (ROOT / "Makefile").read_text("utf-8")


def test_extras_whose_floors_are_not_tested_are_named() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    tested = {Requirement(line).name for extra in ("test", "docs", "eval") for line in extras[extra]}
    untested = {extra for extra, lines in extras.items() if {Requirement(line).name for line in lines} - tested}
    sentence = re.search(r"except those of the extras (.+?), which", (ROOT / "SECURITY.md").read_text("utf-8"))
    assert sentence is not None
    assert set(re.findall(r"`(\w+)`", sentence[1])) == untested


def test_the_version_is_the_same_in_all_files() -> None:
    assert read_yaml(ROOT / "CITATION.cff")["version"] == __version__
    minor = __version__.rpartition(".")[0]
    assert f"| {minor}.x, the latest release | yes |" in (ROOT / "SECURITY.md").read_text("utf-8")
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0] == __version__


def test_new_names_of_the_migration_page_exist() -> None:
    tables = (ROOT / "docs/migration.md").read_text("utf-8").partition("## Functions")[2].partition("## Spelling")[0]
    cells = re.findall(r"^\| `[^|]*\| ([^|]*) \|$", tables, re.MULTILINE)
    new = {word for cell in cells for span in re.findall(r"`([^`]+)`", cell) for word in re.findall(r"\w{4,}", span)}
    sources = [*(ROOT / "dalle_zoo").rglob("*.py"), *(ROOT / "eval/dalle_zoo_eval").rglob("*.py")]
    known = {word for path in sources for word in re.findall(r"\w+", path.read_text("utf-8"))}
    known |= {path.stem for path in sources} | {path.parent.name for path in sources} | {"kernel", "manifold"}  # old
    assert len(new) > 60
    assert new - known == set()


# ------------------------------------------------------------ container


def copied() -> list[str]:
    """Files and folders that the Containerfile copies."""
    lines = re.findall(r"^COPY (.+)$", CONTAINER, re.MULTILINE)
    return [word for line in lines for word in line.split()[:-1]]


def test_the_container_has_what_the_wheel_is_built_from() -> None:
    sources = copied()
    assert all((ROOT / source).exists() for source in sources)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*wheel["packages"], *wheel["force-include"], *settings["project"]["license-files"]]
    needed += [settings["project"]["readme"], "pyproject.toml"]
    assert {name.split("/")[0] for name in needed} == set(sources)


def test_the_container_is_not_kept_from_its_sources() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert [line.removeprefix("!") for line in lines if line.startswith("!")] == copied()
    assert any(fnmatch.fnmatch("dalle_zoo/__pycache__", line) for line in lines)


def test_commands_of_the_container_exist(capsys: pytest.CaptureFixture[str]) -> None:
    runs = re.findall(r"^# +podman run .*? dalle-zoo (.*?)(?: +#.*)?$", CONTAINER, re.MULTILINE)
    assert len(runs) == 3
    for run in runs:
        name, *options = shlex.split(run)
        assert name in COMMANDS
        if name != "fit":
            with pytest.raises(SystemExit, match="0"):
                main([name, "--help"])
            shown = capsys.readouterr().out
            assert all(option in shown for option in options if option.startswith("--"))
    assert 'ENTRYPOINT ["dalle-zoo"]' in CONTAINER
    arguments = re.findall(r"--build-arg (\w+)=", CONTAINER)
    assert set(arguments) <= set(re.findall(r"^ARG (\w+)=", CONTAINER, re.MULTILINE))


# ------------------------------------------------------------ forge


LABELS = {"bug", "enhancement", "documentation", "question"}
"""Labels that every repository of GitHub has; a form's label that does not exist is not set."""


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_for_issues_are_valid(path: Path) -> None:
    form = read_yaml(path)
    assert set(form) == {"name", "description", "labels", "body"}
    assert set(form["labels"]) <= LABELS
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["type"] in ("textarea", "input", "dropdown", "checkboxes") for field in fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)


def test_bug_reports_have_the_environment() -> None:
    fields = [field for path in FORMS[:2] for field in read_yaml(path)["body"] if field.get("id") == "environment"]
    assert len(fields) == 2
    assert all("`dalle-zoo env`" in field["attributes"]["label"] for field in fields)
    assert all(field["validations"] == {"required": True} for field in fields)


def test_the_workflow_runs_what_people_run() -> None:
    (path,) = (ROOT / ".github/workflows").iterdir()
    (job,) = read_yaml(path)["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step][-1] == ".ci/run"
