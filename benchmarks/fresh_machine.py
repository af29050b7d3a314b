"""Measures what README.md says of a fresh machine, and prints its table.

    python -m benchmarks.fresh_machine default                         what pip chooses: torch with CUDA on Linux
    python -m benchmarks.fresh_machine cpu --torch torch==2.13.0+cpu   a build for CPUs is installed before `make demo`

Both clone the last commit into a temporary folder and run `make demo` without the cache of pip, and both write
benchmarks/results/fresh_machine.json. The times are those of the processors, which other programs change little.
`--torch` is any requirement that the settings of pip can find.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dalle_zoo.files import read_json, write_json

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results/fresh_machine.json"
CASES = {
    "default": "`make demo`: environment, packages, images",
    "cpu": "`make demo` where a CPU-only PyTorch is installed",
}


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
    p.add_argument("case", choices=CASES, help="row of the table to measure")
    p.add_argument("--torch", help="requirement to install before `make demo` [none]")
    options = p.parse_args()
    if (options.case == "cpu") != bool(options.torch):
        p.error("--torch belongs to the case cpu, and only to it")
    with tempfile.TemporaryDirectory() as name:
        found = measure(options.torch, Path(name))
    results = (read_json(RESULT) if RESULT.exists() else {}) | {options.case: found}
    write_json(RESULT, results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
