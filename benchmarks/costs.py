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
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from decoding import FLOAT32, SMALL, advance, keep_freed_memory, make_codes, make_prior, make_text, prior_decoder
from harness import Series, interleaved, store
from torch import nn
from torch.nn import functional as F

from dalle_zoo.models.prior import Prior, PriorConfig

CANDIDATES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GRIDS = (8, 16, 24, 32, 48, 64)
TEXT_LENGTHS = (16, 64, 128, 256, 512, 1024)
SIZES = ((6, 384), (12, 512), (12, 768), (24, 768), (24, 1024), (24, 1536), (22, 2048))
"""Layers and width, from 30 million to 1.2 billion parameters."""
LARGE = 400_000_000
"""Parameters above which a prior is timed at `DEPTHS`."""
DEPTHS = (2, 6)
FEW, MANY = 1, 16
"""Candidates of the curves over other quantities."""
ROUNDS = 3
Point = tuple[float, float]


def products(prior: Prior, rows: int) -> Callable[[], None]:
    """Returns a function that multiplies each matrix of a step once, with ``rows`` rows."""
    linears = [m for n, m in prior.named_modules() if isinstance(m, nn.Linear) and n != "text_head"]
    inputs = {m.in_features: torch.randn(rows, m.in_features, device=prior.device) for m in linears}

    def multiply() -> None:
        for linear in linears:
            F.linear(inputs[linear.in_features], linear.weight, linear.bias)

    return multiply


def seconds_per_image(config: PriorConfig, candidates: int, device: str) -> tuple[float, float]:
    """Measures the seconds per image of sampling and of the floor."""
    prior, middle = make_prior(config, FLOAT32, device), config.image_length // 2
    text, codes = make_text(prior), make_codes(prior, candidates).to(device)
    decoder = prior_decoder(prior, text, candidates)
    steps = max(1, 4 // candidates)
    # Empty slots of the cache cost as much as full ones, so the steps before the middle are left out.
    step = partial(advance, decoder, codes, middle, steps)
    prefill = partial(prior_decoder, prior, text, candidates)
    work = {"step": step, "floor": products(prior, candidates), "prefill": prefill}
    found = {name: statistics.median(times) for name, times in interleaved(work, ROUNDS, device).items()}
    sampling = found["prefill"] + config.image_length * found["step"] / steps
    return sampling / candidates, config.image_length * found["floor"] / candidates


def at_depth(config: PriorConfig, candidates: int, device: str) -> tuple[float, float]:
    """Like `seconds_per_image`, for a large prior from two of its depths."""
    if sum(config.count_parameters().values()) < LARGE:
        return seconds_per_image(config, candidates, device)
    shallow, deep = (seconds_per_image(replace(config, num_layers=depth), candidates, device) for depth in DEPTHS)
    scale = (config.num_layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    first, second = (few + scale * (more - few) for few, more in zip(shallow, deep, strict=True))
    return first, second


def curves(points: dict[float, PriorConfig], x: str, device: str) -> Series:
    """Measures one and many candidates of one prompt over a quantity."""
    lines: dict[str, list[Point]] = {}
    for value, config in points.items():
        for candidates in (FEW, MANY):
            shown = "1 image" if candidates == 1 else f"{candidates} images of one prompt, per image"
            for name, seconds in zip((shown, f"{shown}: floor"), at_depth(config, candidates, device), strict=True):
                lines.setdefault(name, []).append((value, seconds))
                print(f"{x} {value:g}: {name} {seconds:.4g} s", flush=True)
    return Series(x=x, y="seconds per image", lines=lines, logarithmic=True)


def by_candidates(device: str) -> Series:
    """Measures the candidates of one prompt."""
    lines: dict[str, list[Point]] = {"sampling": [], "floor": []}
    for candidates in CANDIDATES:
        for name, seconds in zip(lines, seconds_per_image(SMALL, candidates, device), strict=True):
            lines[name].append((candidates, seconds))
            print(f"{candidates} candidates: {name} {seconds:.4g} s", flush=True)
    return Series(x="candidates of one prompt", y="seconds per image", lines=lines, logarithmic=True)


def by_size(device: str) -> Series:
    """Measures priors of growing width and depth."""
    configs = [replace(SMALL, num_layers=n, width=width, num_heads=width // 64) for n, width in SIZES]
    return curves({sum(c.count_parameters().values()) / 1e6: c for c in configs}, "millions of parameters", device)


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
