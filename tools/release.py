"""Builds the distributions and checks them as their users get them: `make release`.

```sh
python -m tools.release           # the packages of this environment are reused: a minute
python -m tools.release --fresh   # all dependencies are installed anew: minutes, and gigabytes where torch has CUDA
```

The distributions reach ``dist/`` only after every check has passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
LARGEST = 100e6
"""Size that PyPI accepts of a file, bytes."""
LICENSES = ("LICENSE", "NOTICE", "THIRD_PARTY_NOTICES.md")
OFFLINE = {"HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
"""Environment in which nothing can be downloaded: no server listens on the discard port."""
INSTALLED = """
import sys
from importlib.metadata import distribution, entry_points
from pathlib import Path

import dalle_zoo, dalle_zoo_eval
from dalle_zoo.cli.main import COMMANDS, main

root = Path(sys.prefix).resolve()
for package in (dalle_zoo, dalle_zoo_eval):
    assert Path(package.__file__).resolve().is_relative_to(root), f"{package.__file__} is not that of the wheel"
assert distribution("dalle-zoo").version == dalle_zoo.__version__
(script,) = entry_points(group="console_scripts", name="dalle-zoo")
assert script.load() is main
for command in COMMANDS:
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0, f"dalle-zoo {command} --help ends with {end.code}"
print(len(COMMANDS))
"""


class CheckError(Exception):
    """A distribution is not fit to be published; the message says why."""


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a command; raises `CheckError` with its output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        shown = " ".join(map(str, command))
        raise CheckError(
            f"{shown[:200]} ended with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    checked: subprocess.CompletedProcess[str] = done
    return checked


def tracked() -> list[str]:
    """Names of the files of the repository that git tracks."""
    return [name for name in run(["git", "ls-files", "-z"], cwd=ROOT).stdout.split("\0") if (ROOT / name).is_file()]


def wheel_names(files: Iterable[str], project: Mapping[str, object]) -> set[str]:
    """Names that tracked files have in the wheel, from the table of hatchling in pyproject.toml.

    Args:
        files: Names of the tracked files.
        project: The table ``tool.hatch.build.targets.wheel``.
    """
    packages, forced = project["packages"], project["force-include"]
    assert isinstance(packages, list)
    assert isinstance(forced, dict)
    places = {f"{package}/": f"{package.rpartition('/')[2]}/" for package in packages}
    places |= {f"{source}/": f"{target}/" for source, target in forced.items() if (ROOT / source).is_dir()}
    names = {
        place + file.removeprefix(source)
        for file in files
        for source, place in places.items()
        if file.startswith(source)
    }
    return names | {str(target) for source, target in forced.items() if source in set(files)}


def difference(what: str, found: set[str], expected: set[str]) -> None:
    """Raises `CheckError` if names are missing or surplus."""
    for problem, names in (("lacks", expected - found), ("has in addition", found - expected)):
        if names:
            raise CheckError(f"{what} {problem} {len(names)} files: {', '.join(sorted(names)[:5])}")


def check_wheel(wheel: Path) -> str:
    """Checks that the wheel has the tracked files of the packages, recipes, cards and protocols, and nothing else."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    expected = wheel_names(tracked(), settings["tool"]["hatch"]["build"]["targets"]["wheel"])
    with zipfile.ZipFile(wheel) as archive:
        if damaged := archive.testzip():
            raise CheckError(f"{wheel.name}: {damaged} is damaged")
        names = {name for name in archive.namelist() if not name.endswith("/")}
    described = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    difference(wheel.name, names - described, expected)
    stem = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    records = {f"{stem}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")}
    difference(f"{stem} of the wheel", described, records | {f"{stem}/licenses/{name}" for name in LICENSES})
    counts = {
        "recipes": "dalle_zoo/_recipes/",
        "cards": "dalle_zoo/_model_cards/",
        "protocols": "dalle_zoo_eval/_protocols/",
        "files of weights": "dalle_zoo/_models/",
        "licenses": f"{stem}/licenses/",
    }
    parts = [f"{sum(name.startswith(folder) for name in names)} {part}" for part, folder in counts.items()]
    return f"{len(names)} files: {', '.join(parts)}"


def check_sdist(sdist: Path) -> str:
    """Checks that the source distribution has the tracked files; the wheel was built from it."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    difference(sdist.name, names, {*tracked(), "PKG-INFO"})
    return f"{len(names)} files, from which the wheel was built"


def check_size(file: Path) -> str:
    """Checks the size of a distribution."""
    size = file.stat().st_size
    if size >= LARGEST:
        raise CheckError(f"{file.name} has {size / 1e6:.1f} MB: expected less than {LARGEST / 1e6:.0f} MB")
    return f"{size / 1e6:.1f} MB, of at most {LARGEST / 1e6:.0f} MB"


def create_environment(folder: Path, wheel: Path, fresh: bool) -> Path:
    """Creates an environment with the wheel.

    Args:
        folder: Folder of the environment.
        wheel: The wheel.
        fresh: Whether to install the dependencies. Otherwise the packages of this environment follow those of the new
            one on its path, without this environment's editable installation.

    Returns:
        The folder of its commands.
    """
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    install: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "bin/python",
        "install",
        "--quiet",
        wheel,
    ]
    run(install if fresh else [*install, "--no-deps", "--no-index"])
    if not fresh:
        (packages,) = folder.glob("lib/python*/site-packages")
        outer = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (packages / "of_the_outer_environment.pth").write_text("\n".join(outer), "utf-8")
    return folder / "bin"


def check_commands(commands: Path, folder: Path) -> str:
    """Checks that the commands of the wheel exist and answer."""
    environment = {**os.environ, **OFFLINE}
    version = run([commands / "dalle-zoo", "--version"], cwd=folder, env=environment).stdout.strip()
    number = run([commands / "python", "-c", INSTALLED], cwd=folder, env=environment).stdout.split()[-1]
    return f"dalle-zoo {version}, --help of {number} commands"


def check_demo(commands: Path, folder: Path) -> str:
    """Generates the demo's images from the installed wheel, in another folder and without the network."""
    printed = run([commands / "dalle-zoo", "demo"], cwd=folder, env={**os.environ, **OFFLINE}).stdout.strip()
    if not (folder / "demo.png").read_bytes().startswith(b"\x89PNG"):
        raise CheckError("dalle-zoo demo wrote no PNG file")
    return f"demo.png {printed.rpartition('  ')[2]}, offline, in an empty folder"


def check_training(commands: Path, folder: Path) -> str:
    """Trains the smallest recipe of the wheel and checks that it leaves weights."""
    run([commands / "dalle-zoo", "fit", "dvae/tiny", "--run", "run"], cwd=folder, env={**os.environ, **OFFLINE})
    if not (folder / "run/model/dvae/model.safetensors").is_file():
        raise CheckError("dalle-zoo fit dvae/tiny wrote no weights")
    return "fit dvae/tiny, with the recipe and the data of the wheel"


def checks(folder: Path, fresh: bool) -> Iterator[tuple[str, str]]:
    """Builds the distributions in a folder and yields what was checked, with the result."""
    built = folder / "dist"
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", built, ROOT])
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    yield "built", f"{sdist.name}, {wheel.name}"
    run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist])
    yield "twine check --strict", "passed"
    yield "contents of the wheel", check_wheel(wheel)
    yield "contents of the sdist", check_sdist(sdist)
    yield "size of the wheel", check_size(wheel)
    yield "size of the sdist", check_size(sdist)
    commands = create_environment(folder / "environment", wheel, fresh)
    yield (
        "installation",
        "with all dependencies" if fresh else "the wheel alone, next to the packages of this environment",
    )
    work = folder / "elsewhere"
    work.mkdir()
    yield "entry points", check_commands(commands, work)
    yield "demo", check_demo(commands, work)
    yield "training", check_training(commands, work)


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Build the distributions and check them.")
    p.add_argument("--fresh", action="store_true", help="install all dependencies anew instead of reusing packages")
    p.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the checked distributions [dist]")
    options = p.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        try:
            for what, result in checks(Path(name), options.fresh):
                print(f"{what:24}{result}", flush=True)
        except CheckError as error:
            print(f"not fit to be published: {error}", file=sys.stderr)
            return 1
        options.out.mkdir(parents=True, exist_ok=True)
        for file in (Path(name) / "dist").iterdir():
            shutil.copy2(file, options.out)
    print(f"{'checked distributions':24}{options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
