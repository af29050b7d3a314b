"""Measures how the time of an image grows: with candidates, the grid, the caption's length and the size of the prior.

    python benchmarks/costs.py --threads 1

The time of an image is that of its prefill and of all its steps, from a few steps at half of the image, divided by the
number of candidates. The floor, in the same plot, multiplies each weight matrix once per step and does nothing else.
Layers of one width are alike, so a prior that would need much memory is timed at two smaller depths, from which the
time at its depth follows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from decoding import FLOAT32, SMALL, advance, keep_freed_memory, make_codes, make_prior, make_text
from harness import Series, interleaved, store
from torch import nn
from torch.nn import functional as F

from dalle_zoo.models.cpu.linears import packed_linears
from dalle_zoo.models.prior import Prior, PriorConfig

CANDIDATES = (1, 4, 16, 64, 256, 512)
GRIDS = (8, 16, 32, 64)
TEXT_LENGTHS = (16, 64, 256, 1024)
SIZES = ((6, 384), (12, 512), (24, 768), (24, 1024), (22, 2048))
"""Layers and width, from 30 million to 1.2 billion parameters."""
LARGE = 300_000_000
"""Parameters above which a prior is timed at `DEPTHS`."""
DEPTHS = (2, 6)
FEW, MANY = 1, 16
"""Candidates of the curves over other quantities."""
NAMES = "sampling", "floor"
ROUNDS = 3
Point = tuple[float, float]


def products(prior: Prior, rows: int) -> Callable[[], None]:
    """Returns a function that multiplies each matrix of a step once, with ``rows`` rows."""
    linears = [m for n, m in prior.named_modules() if isinstance(m, nn.Linear) and n != "text_head"]
    weights = [linear.weight.clone() for linear in linears]  # packing moves the weights of the prior
    inputs = {size: torch.randn(rows, size, device=prior.device) for size in {weight.shape[1] for weight in weights}}

    def multiply() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    return multiply


def seconds_per_image(prior: Prior, candidates: int) -> tuple[float, float]:
    """Measures the seconds per image of sampling and of the floor."""
    device, length = str(prior.device), prior.config.image_length
    text, codes = make_text(prior), make_codes(prior, candidates).to(device)
    multiply, steps = products(prior, candidates), 2 if candidates == 1 else 1

    def prefill() -> None:
        with packed_linears(prior, candidates):
            prior.decoding(text, candidates)

    times = interleaved({"prefill": prefill}, ROUNDS, device)
    with packed_linears(prior, candidates):
        decoder = prior.decoding(text, candidates)
        # Empty slots of the cache cost as much as full ones, so the steps before the middle are left out.
        step = partial(advance, decoder, codes, length // 2, steps)
        times |= interleaved({"step": step, "floor": multiply}, ROUNDS, device)
    found = {name: statistics.median(seconds) for name, seconds in times.items()}
    sampling = found["prefill"] + length * found["step"] / steps
    return sampling / candidates, length * found["floor"] / candidates


def measured(config: PriorConfig, counts: Sequence[int], device: str) -> list[tuple[float, float]]:
    """Measures numbers of candidates; a large prior is measured at two depths, from which its own depth follows."""
    size = sum(config.count_parameters().values())
    depths = DEPTHS if size > LARGE else (config.num_layers,)
    priors = (make_prior(replace(config, num_layers=depth), FLOAT32, device) for depth in depths)
    found = [[seconds_per_image(prior, candidates) for candidates in counts] for prior in priors]
    if len(found) == 1:
        return found[0]
    # The deeper one has one more cycle of the masks, of four layers.
    scale = (config.num_layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    return [(a + scale * (c - a), b + scale * (d - b)) for (a, b), (c, d) in zip(*found, strict=True)]


def by_candidates(device: str) -> Series:
    """Measures the candidates of one prompt."""
    found = measured(SMALL, CANDIDATES, device)
    lines = {
        name: list(zip(CANDIDATES, times, strict=True))
        for name, times in zip(NAMES, zip(*found, strict=True), strict=True)
    }
    print(lines, flush=True)
    return Series(x="candidates of one prompt", y="seconds per image", lines=lines, logarithmic=True)


def curves(points: Mapping[float, PriorConfig], x: str, device: str) -> Series:
    """Measures one and many candidates of one prompt over another quantity."""
    lines: dict[str, list[Point]] = {}
    for value, config in points.items():
        for candidates, found in zip((FEW, MANY), measured(config, (FEW, MANY), device), strict=True):
            for name, seconds in zip(NAMES, found, strict=True):
                lines.setdefault(f"{name}, {candidates} at once", []).append((value, seconds))
        print(x, value, {name: line[-1][1] for name, line in lines.items()}, flush=True)
    return Series(x=x, y="seconds per image", lines=lines, logarithmic=True)


def by_size(device: str) -> Series:
    """Measures priors of growing width and depth."""
    configs = [replace(SMALL, num_layers=n, width=width, num_heads=width // 64) for n, width in SIZES]
    sizes = {round(sum(c.count_parameters().values()) / 1e6): c for c in configs}
    return curves(sizes, "millions of parameters", device)


def main() -> None:
    """Runs the benchmark and stores its curves."""
    parser = argparse.ArgumentParser(description="Measures how the time of an image grows.")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu or cuda (cpu)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    grids: dict[float, PriorConfig] = {side: replace(SMALL, image_height=side, image_width=side) for side in GRIDS}
    texts: dict[float, PriorConfig] = {length: replace(SMALL, text_length=length) for length in TEXT_LENGTHS}
    with torch.inference_mode():
        series = {
            "time of an image by candidates": by_candidates(options.device),
            "time of an image by grid": curves(grids, "side of the grid", options.device),
            "time of an image by text length": curves(texts, "text positions", options.device),
            "time of an image by size": by_size(options.device),
        }
    command = f"python benchmarks/costs.py --threads {options.threads} --device {options.device}"
    print(store("costs", command, [], options.device, series=series))


if __name__ == "__main__":
    main()
