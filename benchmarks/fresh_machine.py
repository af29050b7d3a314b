"""Measures what README.md says of a fresh machine, and prints its table.

    python -m benchmarks.fresh_machine default                         what pip chooses: torch with CUDA on Linux
    python -m benchmarks.fresh_machine cpu --torch torch==2.13.0+cpu   a build for CPUs is installed before `make demo`
    python -m benchmarks.fresh_machine downloads                       what pip downloads for `make demo`, in bytes

The first two clone the last commit into a temporary folder and run `make demo` without the cache of pip. The third one
downloads nothing but uv: it adds the sizes of the files that PyPI lists for Linux on x86-64 and the running Python.
All write benchmarks/results/fresh_machine.json. The times are those of the processors, which other programs change
little. `--torch` is any requirement that the settings of pip can find.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from dalle_zoo.files import read_json, write_json

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results/fresh_machine.json"
CASES = {
    "default": "`make demo`: environment, packages, images",
    "cpu": "`make demo` where a CPU-only PyTorch is installed",
}
DOWNLOADS = "downloads"
LINUX = [*(f"manylinux_2_{minor}_x86_64" for minor in range(40, 4, -1)), "manylinux2014_x86_64", "manylinux1_x86_64"]
"""Platforms of wheels that a Linux of today installs, the preferred one first."""
PYTORCH = ("torch", "triton", "nvidia-", "cuda-")
"""Beginnings of the names of PyTorch's build with CUDA and of what that build alone needs."""


def size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def seconds(command: list[str | Path], folder: Path, environment: dict[str, str]) -> float:
    """Runs a command and returns the processor time of it and of the processes that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def installed(python: Path, package: str) -> str:
    """Version of a package of an environment."""
    program = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def measure(torch: str | None, folder: Path) -> dict[str, Any]:
    """Clones the repository into a folder and runs `make demo` in it.

    Args:
        torch: Requirement to install before, as pip reads it; None for none.
        folder: An empty folder.

    Returns:
        Bytes of the clone, and time and bytes of `make demo`.
    """
    clone = folder / "dalle-zoo"
    seconds(["git", "clone", "--quiet", f"file://{ROOT}", clone], folder, dict(os.environ))
    result = {"clone": size(clone)}
    environment = {**os.environ, "PIP_NO_CACHE_DIR": "1"}
    python = clone / ".venv/bin/python"
    if torch:
        seconds(["make", ".venv/.python"], clone, environment)
        seconds([python, "-m", "pip", "install", "--quiet", torch], clone, environment)
        before = installed(python, "torch")
    result["seconds"] = round(seconds(["make", "demo"], clone, environment))
    result["environment"] = size(clone / ".venv")
    if torch and installed(python, "torch") != before:
        raise SystemExit(f"make demo replaced torch {before} by {installed(python, 'torch')}: expected the former")
    return {**result, "torch": installed(python, "torch"), "date": datetime.now(UTC).date().isoformat()}


def wheel_size(wheels: Iterable[Mapping[str, Any]], tags: Sequence[Tag]) -> int | None:
    """Size of the wheel that pip would choose; None if none fits.

    Args:
        wheels: Entries of a lock file, with `url` and `size`.
        tags: Tags that are supported, the preferred one first.
    """
    rank = {tag: number for number, tag in enumerate(tags)}
    fitting = []
    for wheel in wheels:
        found = parse_wheel_filename(wheel["url"].rpartition("/")[2].replace("%2B", "+"))[3] & rank.keys()
        fitting += [(min(rank[tag] for tag in found), wheel["size"])] if found else []
    return min(fitting)[1] if fitting else None


def downloads(folder: Path) -> dict[str, Any]:
    """Adds the sizes of what pip would download, from a lock file that uv writes into an empty folder."""
    version = ".".join(map(str, sys.version_info[:2]))
    seconds([sys.executable, "-m", "venv", folder / "uv"], folder, dict(os.environ))
    seconds([folder / "uv/bin/python", "-m", "pip", "install", "--quiet", "uv"], folder, dict(os.environ))
    options = ["--quiet", "--format", "pylock.toml", "--python-version", version, "--output-file", "pylock.toml"]
    options += ["--python-platform", "x86_64-unknown-linux-gnu"]
    seconds([folder / "uv/bin/uv", "pip", "compile", ROOT / "pyproject.toml", *options], folder, dict(os.environ))
    tags = [*cpython_tags(sys.version_info[:2], platforms=LINUX)]
    tags += compatible_tags(sys.version_info[:2], f"cp{version.replace('.', '')}", LINUX)
    sizes = {}
    for package in tomllib.loads((folder / "pylock.toml").read_text("utf-8"))["packages"]:
        size = wheel_size(package.get("wheels", ()), tags)
        sizes[package["name"]] = package["sdist"]["size"] if size is None else size
    pytorch = sum(size for name, size in sizes.items() if name.startswith(PYTORCH) and name != "torchmetrics")
    others = sum(sizes.values()) - pytorch
    today = datetime.now(UTC).date().isoformat()
    return {"packages": len(sizes), "pytorch": pytorch, "others": others, "python": version, "date": today}


def sentence(found: Mapping[str, Any]) -> str:
    """Renders what README.md says of downloads."""
    total, others = (found["pytorch"] + found["others"]) / 1e9, found["others"] / 1e6
    return f"pip downloads {found['packages']} packages, {total:.1f} GB, of which all but {others:.0f} MB are PyTorch"


def table(results: dict[str, Any]) -> str:
    """Renders the table of README.md, with a row for each case that was measured."""
    lines = ["| | processor time | on disk |", "|---|---|---|"]
    for case in (case for case in CASES if case in results):
        found = results[case]
        minutes, rest = divmod(found["seconds"], 60)
        clone, environment = f"{found['clone'] / 1e6:.0f} MB", f"{found['environment'] / 1e9:.1f} GB"
        title = f"{CASES[case]}, torch {found['torch']}"
        lines.append(f"| {title} | {minutes} min {rest} s | {environment}, and {clone} of `git clone` |")
    return "\n".join(lines)


def main() -> int:
    p = argparse.ArgumentParser(description="Measure `make demo` on a fresh machine.")
    p.add_argument("case", choices=[*CASES, DOWNLOADS], help="row of the table to measure, or the downloads")
    p.add_argument("--torch", help="requirement to install before `make demo` [none]")
    options = p.parse_args()
    if (options.case == "cpu") != bool(options.torch):
        p.error("--torch belongs to the case cpu, and only to it")
    with tempfile.TemporaryDirectory() as name:
        found = downloads(Path(name)) if options.case == DOWNLOADS else measure(options.torch, Path(name))
    results = (read_json(RESULT) if RESULT.exists() else {}) | {options.case: found}
    write_json(RESULT, results)
    print(sentence(found) if options.case == DOWNLOADS else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
