"""Measures the error of float16 gradients of a deep prior: without a scale, with one scale, with one scale per block.

    python benchmarks/gradient_scaling.py          writes benchmarks/results/gradient_scaling.json and .png

Gradients are compared with those of float32, block by block. Identities between the residual blocks multiply the
gradient by a constant, so that it falls by the stated factor from the first block to the last for any network. The
loss is scaled so that all blocks fit within the paper's limits, 2^7 and 2^24. The identity path is float32 in all
three. The best scale for all is the power of two with the smallest error of the last block among those without
overflow; the scale of one block is the largest of those, found by `GradientScales`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_zoo.files import atomic_write, write_json
from dalle_zoo.models.gradient_scaling import Carrier, GradientScales, GradientScalingConfig, ScaledBranch
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.models.residual import plain

BLOCKS = 48
LOSS_FACTOR = 2.0**-8
"""Factor of the loss, in addition to half of the spread."""
SEARCH = GradientScalingConfig(start=2.0**24, growth=1.0, backoff=0.5, cooldown=1)
"""Searches down from the largest scale by factors of 2; the paper's rule needs thousands of steps for the same."""


class Amplify(torch.autograd.Function):
    """Identity that multiplies its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class Spread:
    """A prior of 48 residual blocks whose gradients fall by 2^spread over the depth, and one batch.

    Args:
        width: Of the prior.
        spread: Base-2 logarithm of the gradients' ratio, first block to last.
        carrier: Of the scaled branches.
        device: Where the prior runs.
    """

    def __init__(self, width: int, spread: float, carrier: Carrier = "emulated", device: str = "cpu") -> None:
        torch.manual_seed(0)
        sizes = {"text_length": 4, "text_vocab": 32, "image_height": 4, "image_width": 4, "codebook_size": 32}
        self.prior = Prior(PriorConfig(**sizes, width=width, num_layers=BLOCKS // 2, num_heads=2))
        for head in (self.prior.text_head, self.prior.image_head):  # initially zero, which would pass no gradient on
            nn.init.normal_(head.weight, std=0.02)
        self.prior.to(device)
        self.carrier = carrier
        self.device = device
        self.blocks = self.prior.residual_blocks()
        self.text, self.codes = torch.randint(32, (8, 4)).to(device), torch.randint(32, (8, 4, 4)).to(device)
        self.loss_factor = LOSS_FACTOR * 2.0 ** (-spread / 2)
        factor = 2.0 ** (spread / (BLOCKS - 1))
        for block in self.blocks[:-1]:
            block.residual.register_forward_hook(lambda module, inputs, output: Amplify.apply(output, factor))
        self.exact = self.gradients(None)

    def gradients(self, scales: Tensor | None) -> list[Tensor]:
        """Returns the unscaled gradient of every block's parameters as a vector; in float32 without scales."""
        for number, block in enumerate(self.blocks):
            block.residual.around = plain if scales is None else ScaledBranch(scales[number], self.carrier)
        self.prior.zero_grad()
        (self.prior.loss(self.text, self.codes).total * self.loss_factor).backward()
        vectors = []
        for number, block in enumerate(self.blocks):
            parameters = [*block.norm.parameters(), *block.branch.parameters()]
            vector = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            vectors.append(vector if scales is None else vector / scales[number])
        return vectors

    def errors(self, gradients: Sequence[Tensor]) -> list[float]:
        """Returns the relative error of every block."""
        return [float((g - e).norm() / e.norm()) for g, e in zip(gradients, self.exact, strict=True)]

    def one_scale(self, exponent: int) -> tuple[bool, list[float]]:
        """Returns whether no gradient overflows with one scale for all blocks, and the errors."""
        gradients = self.gradients(torch.full((BLOCKS,), 2.0**exponent, device=self.device))
        return all(bool(g.isfinite().all()) for g in gradients), self.errors(gradients)

    def best_scale(self, exponents: Sequence[int]) -> tuple[int, list[float]]:
        """Returns the exponent of the best scale for all blocks, and the errors."""
        measured = [(exponent, *self.one_scale(exponent)) for exponent in exponents]
        finite = [(exponent, errors) for exponent, fits, errors in measured if fits]
        if not finite:
            raise ValueError(f"gradients overflow with every scale from 2^{exponents[0]}: try smaller scales")
        return min(finite, key=lambda entry: entry[1][-1])

    def scale_per_block(self) -> tuple[list[float], list[float]]:
        """Returns the base-2 logarithms of the largest scales without overflow, and the errors."""
        scales = GradientScales(BLOCKS, SEARCH, self.device)
        while True:
            used = scales.values.clone()
            gradients = self.gradients(used)
            finite = torch.stack([g.isfinite().all() for g in gradients])
            scales.update(finite)
            if torch.equal(scales.values, used):  # all finite, or at the lower limit
                return used.log2().tolist(), self.errors(gradients)

    def ratio(self) -> float:
        """Returns the base-2 logarithm of the ratio of gradient norms, first MLP to last."""
        return math.log2(float(self.exact[1].norm() / self.exact[-1].norm()))


def main() -> None:
    """Measures, prints, stores and plots the errors."""
    parser = argparse.ArgumentParser(description="Errors of float16 gradients under three ways of scaling.")
    parser.add_argument("--width", type=int, default=128, help="width of the prior (128)")
    parser.add_argument("--spreads", type=float, nargs="+", default=[0, 12, 20, 29], help="log2 of the spreads")
    parser.add_argument("--carrier", default="emulated", choices=["emulated", "float16"], help="float16 or emulated")
    parser.add_argument("--device", default="cpu", help="device of the prior (cpu)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gradient_scaling.json"))
    options = parser.parse_args()
    rows = []
    print("spread   no scale   one scale (best)   one per block     relative error of the last block")
    for spread in options.spreads:
        net = Spread(options.width, spread, options.carrier, options.device)
        _, none = net.one_scale(0)
        exponent, one = net.best_scale(range(32))
        scales, per_block = net.scale_per_block()
        rows.append(
            {
                "log2 of the spread": spread,
                "log2 of the norms' ratio, first MLP to last": net.ratio(),
                "log2 of the best scale for all": exponent,
                "log2 of the scale of each block": scales,
                "error without a scale": none,
                "error with the best scale for all": one,
                "error with a scale per block": per_block,
            }
        )
        print(f"2^{spread:<7g}{none[-1]:<11.2g}{one[-1]:<7.2g}(2^{exponent})     {per_block[-1]:<.2g}", flush=True)
    spreads = " ".join(f"{spread:g}" for spread in options.spreads)
    result = {
        "command": f"python benchmarks/gradient_scaling.py --width {options.width} --spreads {spreads} "
        f"--carrier {options.carrier} --device {options.device}",
        "residual blocks": BLOCKS,
        "width": options.width,
        "carrier": options.carrier,
        "rows": rows,
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    write_json(options.out, result)
    plot(result, options.out.with_suffix(".png"))


def plot(result: dict[str, Any], out: Path) -> None:
    """Plots the errors by block at the largest spread."""
    from matplotlib.figure import Figure

    row = max(result["rows"], key=lambda row: row["log2 of the spread"])
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    marks = {"without a scale": "x", "with the best scale for all": "o", "with a scale per block": "."}
    for name, mark in marks.items():
        axis.semilogy(range(1, BLOCKS + 1), row[f"error {name}"], mark, label=name, markersize=5)
    axis.set_xlabel("residual block")
    axis.set_ylabel("relative error of the block's gradient")
    axis.set_title(f"float16 branches, gradients falling by 2^{row['log2 of the spread']:g} over {BLOCKS} blocks")
    axis.legend()
    with atomic_write(out) as aside:
        figure.savefig(aside, format="png", dpi=120)


if __name__ == "__main__":
    main()
