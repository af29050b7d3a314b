"""Measures for which rows and widths packed matrices are faster: ``python benchmarks/packing.py --threads 1``.

`dalle_zoo.models.cpu.linears.is_faster` is the rule made of it.
"""

from __future__ import annotations

import argparse

import torch
from decoding import FLOAT32, keep_freed_memory
from harness import Equality, Row, compare, store
from torch.nn import functional as F

from dalle_zoo.models.cpu import onednn
from dalle_zoo.models.cpu.linears import is_faster

WIDTHS = (192, 512, 1024)
ROWS = (1, 2, 4, 16, 64, 280)
BYTES = 2**26
"""Size of all matrices together: larger than the caches, as in a prior, so that each is read from memory."""
ROUNDING = 1e-3
"""Largest difference allowed between float32 products: sums of many terms in another order."""


def row(width: int, rows: int) -> Row:
    """Compares the packed and the plain products of the matrices of some layers with the same inputs."""
    shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    layers = max(1, BYTES // (4 * sum(out * inputs for out, inputs in shapes)))
    matrices = [torch.randn(shape) for _ in range(layers) for shape in shapes]
    packed = [onednn.reorder_linear(matrix, rows) for matrix in matrices]
    inputs = {size: torch.randn(rows, 1, size) for size in (width, 4 * width)}

    def plain() -> list[torch.Tensor]:
        return [F.linear(inputs[m.shape[1]], m) for m in matrices]

    def with_packed() -> list[torch.Tensor]:
        return [onednn.linear(inputs[m.shape[1]], p, None) for m, p in zip(matrices, packed, strict=True)]

    apart = max(float((a - b).abs().max()) for a, b in zip(plain(), with_packed(), strict=True))
    chosen = sum(is_faster(matrix, rows) for matrix in matrices[: len(shapes)])
    return compare(
        f"products of layers of width {width:,} with {rows} row{'s' * (rows > 1)}; "
        f"the rule packs {chosen} of {len(shapes)} matrices",
        {"packed": with_packed, "plain": plain},
        path="packed",
        against="plain",
        target=None,
        equal=(Equality(what="largest difference of the products", value=apart, limit=ROUNDING),),
        dtype=str(FLOAT32).removeprefix("torch."),
    )


def main() -> None:
    """Runs the benchmark and stores its results."""
    parser = argparse.ArgumentParser(description="Time of packed and plain matrix products on a CPU.")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    with torch.inference_mode():
        rows = [row(width, rows) for width in WIDTHS for rows in ROWS]
    print(store("packing", f"python benchmarks/packing.py --threads {options.threads}", rows))


if __name__ == "__main__":
    main()
