"""Runs all benchmarks and writes docs/design/speed.md: ``python -m benchmarks [--threads 1 2] [--device cuda]``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from dalle_zoo.registry import suggest

ROOT = Path(__file__).parents[1]
SCRIPTS = (
    "decoding",
    "memory",
    "costs",
    "quantization",
    "jacobi",
    "training",
    "updates",
    "dvae",
    "data",
    "packing",
    "shortcuts",
    "generate",
)
CPU_ONLY = ("memory", "updates", "data", "packing", "shortcuts")
"""Benchmarks of what only a CPU does; they have no option for the device."""


def main() -> int:
    """Runs the scripts, each in its own process, one after the other."""
    parser = argparse.ArgumentParser(
        prog="make bench", description="Runs all speed benchmarks and writes docs/design/speed.md."
    )
    parser.add_argument("only", nargs="*", help=f"benchmarks to run: {', '.join(SCRIPTS)} (all)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (1 2)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu or cuda (cpu)")
    options = parser.parse_args()
    if min(options.threads) < 1:
        parser.error(f"--threads must be at least 1, got {min(options.threads)}")
    for name in options.only:
        if name not in SCRIPTS:
            parser.error(suggest("benchmark", name, SCRIPTS))
    for script in options.only or SCRIPTS:
        if script in CPU_ONLY and options.device != "cpu":
            continue
        for threads in options.threads if options.device == "cpu" else [os.cpu_count() or 1]:
            command = [sys.executable, f"benchmarks/{script}.py", "--threads", str(threads)]
            command += [] if script in CPU_ONLY else ["--device", options.device]
            print(f"\n$ {' '.join(['python', *command[1:]])}", flush=True)
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}"}
            done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
            if done.returncode:
                return done.returncode
    return subprocess.run([sys.executable, "benchmarks/report.py"], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
