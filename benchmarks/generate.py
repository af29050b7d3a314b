"""Compares the complete command, from its start to the image on disk, with the code before the optimizations.

    python benchmarks/generate.py --threads 2

Both run alternately in separate processes, as a user runs them, with the bundled weights. The older code comes from
the history of this repository, so the script needs a git checkout.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import ROUNDS, Equality, Row, store
from PIL import Image

ROOT = Path(__file__).parents[1]
BEFORE = "fecf8fa"
"""The commit before the optimizations of speed."""
BEYOND = 0.3
"""Seconds that the command may take beyond the import of PyTorch."""
RUN = "import sys; from dalle_zoo.cli.main import main; sys.exit(main())"
PROMPT, CANDIDATES = "a 3d emoji of a red apple", 16


def unpack(commit: str, folder: Path) -> Path:
    """Extracts the package at a commit."""
    archive = subprocess.run(["git", "archive", commit, "dalle_zoo"], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(f"{ROOT} has no commit {commit}: this benchmark needs a git checkout with its history")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def run(code: str, source: Path, threads: int, *arguments: str) -> float:
    """Times a Python process with the package from ``source``: CPU seconds with one thread, otherwise wall seconds."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has compiled modules
    used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)  # imports look there first
    if threads > 1:
        return time.perf_counter() - start
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def pixels(path: Path) -> np.ndarray:
    """Reads an image as integers."""
    return np.asarray(Image.open(path)).astype(int)


def main() -> None:
    """Runs the benchmark and stores its results."""
    parser = argparse.ArgumentParser(
        description="Times the complete command, compared with the code before the optimizations."
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU (2)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu or cuda (cpu)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = {"now": ROOT, "before": unpack(BEFORE, folder)}
        seconds: dict[str, list[float]] = {name: [] for name in [*sources, "import torch"]}
        for number in range(-1, ROUNDS):  # the first one fills the caches of the file system and of Python
            for name, source in sources.items():
                arguments = ["generate", PROMPT, "-n", str(CANDIDATES), "--seed", "0", "--device", options.device]
                arguments += ["--out", str(folder / f"{name}.png"), "--overwrite"]
                took = run(RUN, source, options.threads, *arguments)
                seconds[name] += [took] * (number >= 0)
            seconds["import torch"] += [run("import torch", ROOT, options.threads)] * (number >= 0)
        difference = int(np.abs(pixels(folder / "now.png") - pixels(folder / "before.png")).max())
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    row = Row(
        name=f"dalle-zoo generate -n {CANDIDATES}, bundled weights, from start to file",
        path="now",
        against="before",
        target=3.0,
        ratio=middle["before"] / middle["now"],
        equal=(Equality(what="largest difference of a pixel, of 255", value=difference, limit=0),),
        seconds=seconds,
        threads=options.threads,
        note=f"`import torch` takes {middle['import torch']:.2f} s of the {middle['now']:.2f} s",
    )
    least = f"import torch and {BEYOND} s"
    beyond = Row(
        name=row.name,
        path="now",
        against=least,
        target=1.0,
        ratio=(middle["import torch"] + BEYOND) / middle["now"],
        equal=(),
        seconds={"now": seconds["now"], least: [time + BEYOND for time in seconds["import torch"]]},
        threads=options.threads,
        note=f"{middle['now'] - middle['import torch']:.2f} s more than `import torch`",
    )
    print(f"{row.name}: {row.ratio:.2f}x of {row.target}x; {middle}")
    command = f"python benchmarks/generate.py --threads {options.threads} --device {options.device}"
    print(store("generate", command, [row, beyond], options.device))


if __name__ == "__main__":
    main()
