"""Checks and measures dalle-zoo on one GPU: ``python -m benchmarks.gpu_check [--stages NAME ...] [--seconds S]``.

Stages run one after the other, the most valuable first, each in its own process and within its own limit of time. One
that fails or takes too long does not stop the others. The results are written after every figure, so a run that is
killed leaves what it measured: ``gpu-check.json``, and ``gpu-check.md`` for people. ``--device cpu --tiny`` runs
all stages with small shapes on a CPU, which shows that the command works, and nothing about speed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "eval"), str(ROOT / "benchmarks")]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402 (a checkout runs uninstalled)

from benchmarks.gpu_check.check import run_stage, store  # noqa: E402
from benchmarks.gpu_check.stages import STAGES  # noqa: E402
from benchmarks.gpu_check.summary import render  # noqa: E402
from dalle_zoo.registry import suggest  # noqa: E402
from dalle_zoo.version import __version__  # noqa: E402

SECONDS = 460
"""Default limit of the run, so that it ends within 8 minutes."""
RESERVE = 2
"""Seconds of the limit that are left for writing the results."""


def main() -> int:
    """Runs the stages."""
    parser = argparse.ArgumentParser(
        prog="make gpu-check", description=__doc__.partition("\n\n")[2], epilog="stages: " + ", ".join(STAGES)
    )
    parser.add_argument("--stages", nargs="+", metavar="NAME", default=list(STAGES), help="stages to run (all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"limit of the run, seconds ({SECONDS})")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cuda or cpu (cuda)")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the command on a CPU")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu-check"), help="folder (outputs/gpu-check)")
    options = parser.parse_args()
    for name in options.stages:
        if name not in STAGES:
            parser.error(suggest("stage", name, STAGES))
    if options.device == "cuda" and not has_gpu():
        parser.error("PyTorch finds no CUDA device; --device cpu --tiny tries the command without one")
    if options.device == "cpu" and not options.tiny:
        parser.error("the shapes are those of a GPU: add --tiny to --device cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(options)
    print(f"\n{options.out / 'gpu-check.md'}\n{options.out / 'gpu-check.json'}")
    return int(any(stage["status"] != "done" or stage["errors"] for stage in result["stages"].values()))


def has_gpu() -> bool:
    """Whether PyTorch finds a GPU; asked in another process, because a driver does not survive a fork."""
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(not torch.cuda.is_available()))
    process.start()
    process.join()
    return process.exitcode == 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the stages and returns their results."""
    start = time.monotonic()
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.gpu_check {' '.join(sys.argv[1:])}".strip(),
        "device": options.device,
        "tiny": options.tiny,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dalle_zoo": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "stages": {name: {"status": "not reached"} for name in options.stages},
    }

    def report() -> None:
        result["seconds"] = time.monotonic() - start
        store(options.out, result, render(result))

    limits: dict[str, float] = {}
    for name, stage in result["stages"].items():
        left = options.seconds - RESERVE - (time.monotonic() - start)
        if left < 1:
            break
        print(f"\n{name}: {STAGES[name].about}", flush=True)
        given = {"device": options.device, "tiny": options.tiny, "limits": limits}
        limit = left if options.tiny else min(STAGES[name].limit, left)  # the limits are for a GPU
        run_stage(name, STAGES[name], given, limit, report, stage)
        for finding in stage["findings"] if name == "ceilings" else ():
            limits |= finding["details"].get("limit", {})
        print(f"  {stage['status']}, {stage['seconds']:.0f} s", flush=True)
    report()
    return result


if __name__ == "__main__":
    sys.exit(main())
