"""Measures what the private operators of PyTorch are worth: each path with them, and with the switch off.

    python benchmarks/shortcuts.py --threads 1

`dalle_zoo.models.shortcuts` lists them. Both paths run alternately in one process on the same inputs and weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from decoding import (
    BFLOAT16,
    FLOAT32,
    SMALL,
    decode_up_to,
    keep_freed_memory,
    make_codes,
    make_prior,
    make_text,
    prior_decoder,
)
from dvae import unequal
from harness import ROUNDS, Equality, Row, compare, store
from torch import Tensor
from training import attention_row

from dalle_zoo.data import center_transform, decode_image, open_source
from dalle_zoo.models.shortcuts import turned_off
from dalle_zoo.pipeline import load_model

ON, OFF = "private operators", "public operators"
TOKENS = 8
"""Tokens of a timed call."""
ROUNDING = 1e-4
"""Largest difference allowed between float32 logits or pixels: sums of many products in another order."""


def without_shortcuts(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Returns a function that runs with public operators only."""

    def run() -> Tensor:
        with turned_off():
            return work()

    return run


def sampling(candidates: int, dtype: torch.dtype) -> Row:
    """Compares tokens of an image sampled with packed and with plain matrices."""
    prior = make_prior(SMALL, dtype)
    text, codes = make_text(prior), make_codes(prior, candidates)
    decoders = {ON: prior_decoder(prior, text, candidates)}
    with turned_off():
        decoders[OFF] = prior_decoder(prior, text, candidates)
    start = SMALL.image_length // 2
    for decoder in decoders.values():
        decode_up_to(decoder, codes, start)

    def tokens(path: str) -> Tensor:
        steps = range(start, start + TOKENS)
        return torch.stack([decoders[path].step(index, codes[:, :, index - 1]) for index in steps])

    apart = float((tokens(ON) - tokens(OFF)).abs().max())
    return compare(
        f"{TOKENS} tokens, 12 layers of width 512, {candidates} candidate{'s' * (candidates > 1)}",
        {ON: lambda: tokens(ON), OFF: lambda: tokens(OFF)},
        path=ON,
        against=OFF,
        target=None,
        equal=(
            Equality(
                what="largest difference of the logits", value=apart, limit=ROUNDING if dtype == FLOAT32 else None
            ),
        ),
        dtype=str(dtype).removeprefix("torch."),
    )


def images() -> list[Row]:
    """Compares encoding and decoding images by fused convolutions and by the modules of the network."""
    net = load_model("composition", "dvae")
    samples = list(open_source("composition:val-styles").stream())[:16]
    pixels = torch.stack([center_transform(decode_image(s.image), net.image_size) for s in samples]) / 255
    codes = net.encode(pixels)
    decoded = net.decode(codes)
    works = {
        "encode": (lambda: net.encode(pixels), "share of codes that differ", lambda x: unequal(x, codes), 1e-3),
        "decode": (
            lambda: net.decode(codes),
            "largest difference of a pixel in [0, 1]",
            lambda x: float((x - decoded).abs().max()),
            ROUNDING,
        ),
    }
    rows = []
    for name, (work, what, differ, limit) in works.items():
        plain = without_shortcuts(work)
        rows.append(
            compare(
                f"{name}, composition, {len(pixels)} images per call",
                {ON: work, OFF: plain},
                path=ON,
                against=OFF,
                target=None,
                equal=(Equality(what=what, value=differ(plain()), limit=limit),),
                rounds=ROUNDS,
            )
        )
    return rows


def main() -> None:
    """Runs the benchmark and stores its results."""
    parser = argparse.ArgumentParser(description="Time with private operators of PyTorch, and without them.")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    with torch.no_grad():
        rows = [sampling(candidates, dtype) for candidates in (1, 16) for dtype in (FLOAT32, BFLOAT16)]
        rows += images()
    rows += [attention_row(spec, FLOAT32, None, "cpu") for spec in ("row", "column")]
    print(store("shortcuts", f"python benchmarks/shortcuts.py --threads {options.threads}", rows))


if __name__ == "__main__":
    main()
