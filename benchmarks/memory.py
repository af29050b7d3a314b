"""Peak memory of sampling on a CPU, against the weights alone: ``python benchmarks/memory.py``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from decoding import make_prior, make_text
from harness import Row, store

from dalle_zoo.models.prior import PriorConfig
from dalle_zoo.sampling import sample_codes

SHAPES = {
    "12 layers of width 512, 64 + 16 x 16 tokens": PriorConfig(
        text_length=64, image_height=16, image_width=16, width=512, num_layers=12, num_heads=8
    ),
    "24 layers of width 1024, 256 + 32 x 32 tokens": PriorConfig(
        text_length=256, image_height=32, image_width=32, width=1024, num_layers=24, num_heads=16
    ),
}
STATUS = Path("/proc/self/status")
MOST = 1.15
"""Memory that sampling one image may take in all, in units of the weights."""


def resident(peak: bool) -> int:
    """Bytes of memory that this process has now, or had at most since `forget_peak`."""
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None, "needs Linux"
    return 1024 * int(found[1])


def forget_peak() -> None:
    """Begins a new measurement of the peak."""
    Path("/proc/self/clear_refs").write_text("5")


class EnoughError(Exception):
    """Ends sampling early: all memory is in use after a few tokens."""


def measure(config: PriorConfig, candidates: int, threads: int) -> tuple[int, int]:
    """Returns the bytes of the weights, and the largest memory beyond them while the first tokens are sampled."""
    torch.set_num_threads(threads)
    small = PriorConfig(text_length=8, image_height=4, image_width=4, width=64, num_layers=2, num_heads=1)
    warm = make_prior(small, torch.float32)
    sample_codes(warm, make_text(warm), torch.zeros(1, 1, dtype=torch.long))  # loads libraries
    prior = make_prior(config, torch.float32)
    weights = sum(p.numel() * p.element_size() for p in prior.parameters())
    text, seeds = make_text(prior), torch.arange(candidates)[None]
    gc.collect()
    before = resident(peak=False)
    forget_peak()

    def stop(progress: object) -> None:
        if getattr(progress, "done", 0) >= 8:
            raise EnoughError

    with contextlib.suppress(EnoughError):
        sample_codes(prior, text, seeds, callback=stop)
    return weights, resident(peak=True) - before


def row(name: str, config: PriorConfig, candidates: int) -> Row:
    """Measures in a process of its own, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        weights, beyond = pool.submit(measure, config, candidates, torch.get_num_threads()).result()
    return Row(
        name=f"peak memory of sampling {candidates} image{'s' * (candidates > 1)}, {name}",
        path="dalle-zoo",
        against="weights alone",
        target=round(1 / MOST, 2) if candidates == 1 else None,
        ratio=weights / (weights + beyond),
        equal=(),
        seconds={"dalle-zoo": [float(weights + beyond)], "weights alone": [float(weights)]},
        unit="bytes",
        threads=torch.get_num_threads(),
        note=f"resident memory; the target allows {MOST} times the weights",
    )


def main() -> None:
    """Runs the benchmark and stores its results."""
    parser = argparse.ArgumentParser(description="Measures the peak memory of sampling on a CPU.")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row(name, config, candidates) for name, config in SHAPES.items() for candidates in (1, 16)]
    print(store("memory", f"python benchmarks/memory.py --threads {options.threads}", rows, "cpu"))


if __name__ == "__main__":
    main()
