"""Compares the complete command, from its start to the image on disk, with the import of PyTorch alone.

    python benchmarks/generate.py --threads 2

Both run alternately in separate processes, as a user runs them, with the bundled weights.
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

from harness import ROUNDS, Row, store

ROOT = Path(__file__).parents[1]
BEYOND = 0.3
"""Seconds that the command may take beyond the import of PyTorch."""
RUN = "import sys; from dalle_zoo.cli.main import main; sys.exit(main())"
MODULES = "dalle_zoo.call, dalle_zoo.cli.generate, dalle_zoo.loading, dalle_zoo.pipeline"
IMPORTS = f"import gc; gc.disable(); import {MODULES}"
"""What the command imports before it reads weights, as it does it: without collecting garbage."""
PROMPT, CANDIDATES = "a red apple", 16


def run(code: str, threads: int, *arguments: str) -> float:
    """Times a Python process with this checkout: CPU seconds with one thread, otherwise wall seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has compiled modules
    used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)  # imports look there first
    if threads > 1:
        return time.perf_counter() - start
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def main() -> None:
    """Runs the benchmark and stores its results."""
    parser = argparse.ArgumentParser(description="Times the complete command, compared with `import torch`.")
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU (2)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu or cuda (cpu)")
    options = parser.parse_args()
    now, alone, imports = "now", f"import torch and {BEYOND} s", "imports of the command"
    seconds: dict[str, list[float]] = {now: [], alone: [], imports: []}
    with tempfile.TemporaryDirectory() as folder:
        command = ["generate", PROMPT, "-n", str(CANDIDATES), "--seed", "0", "--device", options.device]
        command += ["--out", str(Path(folder) / "grid.png"), "--overwrite"]
        for number in range(-1, ROUNDS):  # the first one fills the caches of the file system and of Python
            times = {
                now: run(RUN, options.threads, *command),
                alone: run("import torch", options.threads) + BEYOND,
                imports: run(IMPORTS, options.threads),
            }
            for name, took in times.items():
                seconds[name] += [took] * (number >= 0)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    row = Row(
        name=f"dalle-zoo generate -n {CANDIDATES}, bundled weights, from start to file",
        path=now,
        against=alone,
        target=1.0,
        ratio=middle[alone] / middle[now],
        equal=(),
        seconds=seconds,
        threads=options.threads,
        note=f"{middle[imports]:.2f} s for all imports, {middle[alone] - BEYOND:.2f} s for `import torch` alone, and "
        f"{middle[now] - middle[imports]:.2f} s to read the weights, sample {CANDIDATES} images and decode them",
    )
    print(f"{row.name}: {row.ratio:.2f}x of {row.target}x; {middle}")
    arguments = f"python benchmarks/generate.py --threads {options.threads} --device {options.device}"
    print(store("generate", arguments, [row], options.device))


if __name__ == "__main__":
    main()
