"""Measures the loss of low-rank gradients: a small prior on two processes, by rank and feedback.

    dalle-zoo encode composition:train --model composition --out runs/codes/train
    dalle-zoo encode composition:val-styles --model composition --out runs/codes/val-styles
    python benchmarks/powersgd.py              writes benchmarks/results/powersgd.json and powersgd.png

Every run starts from the same weights and sees the same batches in the same order, so the gap between two runs comes
from their gradients and from the noise with which training amplifies any difference. The two runs at width / 8 with
error feedback differ only by the rounding on the wire and show the size of this noise. In table 1 of the paper the
smallest rank without a gap is about a quarter of the width.

Stored results: powersgd.json has one seed of 600 steps; powersgd_200_steps.json has two seeds of 200 steps, where the
noise still hides the gain of error feedback.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dalle_zoo.data import CodeDataset
from dalle_zoo.files import write_json
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.recipes import find_recipe, read_recipe
from dalle_zoo.tokenizers import CaptionEncoder, load_text_tokenizer
from dalle_zoo.training.optimizer import AdamWConfig, decayed_names, make_optimizer
from dalle_zoo.training.powersgd import PowerSGD
from dalle_zoo.training.schedules import LearningRate
from dalle_zoo.zoo import find_component

WORLD = 2
WINDOW = 20
"""Steps over which a curve is averaged."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """How gradients are averaged; without a divisor they are exact."""

    divisor: int | None = None
    """Divisor d: the rank is width / d."""
    error_feedback: bool = True
    fixed: bool = True
    """Whether Q is the same in all steps."""
    wire: str = "float32"


EXCHANGES = {
    "exact mean": Exchange(),
    "rank width / 8": Exchange(divisor=8),
    "rank width / 8, no error feedback": Exchange(divisor=8, error_feedback=False),
    "rank width / 8, Q resampled": Exchange(divisor=8, fixed=False),
    "rank width / 8, bfloat16 wire": Exchange(divisor=8, wire="bfloat16"),
    "rank width / 32": Exchange(divisor=32),
}


def network(width: int, num_layers: int) -> PriorConfig:
    """Returns the prior of the recipe `prior/composition` with another width and depth."""
    config = read_recipe(find_recipe("prior/composition"))["model"]["init_args"]["config"]
    return PriorConfig(**config | {"width": width, "num_layers": num_layers, "num_heads": width // 64})


def read_codes(folder: Path, text_length: int) -> tuple[Tensor, Tensor]:
    """Reads all records of code shards: text ids (N, T), codes (N, h, w)."""
    items = list(CodeDataset(folder))
    encoder = CaptionEncoder(load_text_tokenizer(find_component("composition", "tokenizer")), text_length)
    return encoder([item["caption"] for item in items]), torch.stack([item["codes"] for item in items])


class Averager:
    """Averages the gradients of a network over all processes."""

    def __init__(self, net: Prior, exchange: Exchange, seed: int) -> None:
        self.net, self.exchange, self.seed = net, exchange, seed
        self.matrices = {p for block in net.residual_blocks() for p in block.branch.parameters() if p.ndim == 2}
        self.powersgd = self.make(seed)

    def make(self, seed: int) -> PowerSGD:
        # A rank above that of every matrix leaves all gradients uncompressed.
        width = self.net.config.width
        rank = width // self.exchange.divisor if self.exchange.divisor else width
        return PowerSGD(
            rank, seed=seed, wire_dtype=getattr(torch, self.exchange.wire), error_feedback=self.exchange.error_feedback
        )

    def __call__(self, step: int) -> None:
        if not self.exchange.fixed and step:
            pending = self.powersgd.error_means()
            self.powersgd = self.make(self.seed + step)
            self.powersgd.load_error_means(pending)
        matrices, others = {}, []
        for name, p in self.net.named_parameters():
            assert p.grad is not None, name
            if p not in self.matrices:
                others.append(p.grad)
            else:  # queries, keys and values are three matrices of table 2
                parts = p.grad.chunk(3) if name.endswith("qkv.weight") else [p.grad]
                matrices.step({f"{name}#{number}": part for number, part in enumerate(parts)})
        if not self.powersgd.reduce(matrices, others):
            raise FloatingPointError(f"update {step} is not finite: lower the learning rate")


def train(exchange: Exchange, seed: int, data: dict[str, tuple[Tensor, Tensor]], options: Any) -> dict[str, Any]:
    """Runs one training on this process and the other one."""
    torch.manual_seed(seed)
    net = Prior(network(options.width, options.layers), backend="lines")
    average = Averager(net, exchange, seed)
    rate = LearningRate(
        peak=2.0e-3, warmup_steps=50, decay="cosine", final=2.0e-5, decay_steps=max(1, options.steps - 50)
    )
    optimizer = make_optimizer(net, AdamWConfig(beta2=0.96, weight_decay=4.5e-2), rate.peak, decayed_names(net))
    text, codes = data["train"]
    order = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(options.steps):
        chosen = torch.randint(len(text), (WORLD, options.batch), generator=order)[dist.get_rank()]
        with torch.autocast("cpu", torch.bfloat16):
            loss = net.loss(text[chosen], codes[chosen]).total
        optimizer.zero_grad()
        loss.backward()
        average(step)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate.at(step)
        optimizer.step()
        losses.append(float(loss.detach()))
    means = torch.tensor(losses) / WORLD
    dist.all_reduce(means)
    losses = means.tolist()
    traffic = average.powersgd.traffic
    assert traffic is not None
    return {
        "train": [statistics.fmean(losses[start : start + WINDOW]) for start in range(0, len(losses), WINDOW)],
        "train, last quarter": statistics.fmean(losses[-max(1, len(losses) // 4) :]),
        "val-styles": evaluate(net, *data["val"]),
        "bytes per step": traffic.sent,
        "compression rate of the matrices": traffic.compression_rate,
    }


@torch.no_grad()
def evaluate(net: Prior, text: Tensor, codes: Tensor) -> float:
    """Returns the mean loss over images that no run trains on."""
    total = 0.0
    for start in range(0, len(text), 64):
        part = slice(start, start + 64)
        total += float(net.loss(text[part], codes[part]).total) * len(text[part])
    return total / len(text)


def work(rank: int, folder: str, options: Any) -> None:
    """Runs all trainings on one process, one after the other."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    length = network(options.width, options.layers).text_length
    data = {"train": read_codes(options.train, length), "val": read_codes(options.val, length)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in EXCHANGES}
    for seed in range(options.seeds):
        for name, exchange in EXCHANGES.items():
            found[name].append(train(exchange, seed, data, options))
            if rank == 0:
                print(f"seed {seed}, {name}: {found[name][-1]['train, last quarter']:.4f}", flush=True)
    if rank == 0:
        write_json(Path(folder) / "found.json", found)
    dist.destroy_process_group()


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns by exchange the mean losses over the seeds, and their gaps to the exact exchange on the same seed."""
    table = {}
    for name, entries in runs.items():
        row: dict[str, Any] = {key: entries[0][key] for key in ("bytes per step", "compression rate of the matrices")}
        for loss in ("train, last quarter", "val-styles"):
            gaps = [entry[loss] - exact[loss] for entry, exact in zip(entries, runs["exact mean"], strict=True)]
            row[loss] = statistics.fmean(entry[loss] for entry in entries)
            row[f"{loss}, gap"] = {"mean": statistics.fmean(gaps), "by seed": gaps}
        table[name] = row
    return table


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plots the loss (left) and its distance from the exact exchange (right), as means over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    mean = {
        name: [statistics.fmean(values) for values in zip(*(entry["train"] for entry in entries), strict=True)]
        for name, entries in runs.items()
    }
    steps = [WINDOW * (number + 0.5) for number in range(len(mean["exact mean"]))]
    for color, (name, curve) in zip(("black", "C0", "C3", "C2", "C4", "C1"), mean.items(), strict=True):
        left.plot(steps, curve, color=color, label=name)
        gap = [value - exact for value, exact in zip(curve, mean["exact mean"], strict=True)]
        right.plot(steps, gap, color=color)
    left.set(xlabel="step", ylabel="training loss, nats per token")
    right.set(xlabel="step", ylabel="training loss above that of the exact mean")
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Runs all trainings, and prints and stores the comparison."""
    parser = argparse.ArgumentParser(description="Loss of the prior under low-rank gradients, on two processes.")
    parser.add_argument("--train", type=Path, default=Path("runs/codes/train"), help="code shards to train on")
    parser.add_argument("--val", type=Path, default=Path("runs/codes/val-styles"), help="code shards to validate on")
    parser.add_argument("--width", type=int, default=192, help="width, a multiple of 64 (192, the recipe's)")
    parser.add_argument("--layers", type=int, default=8, help="layers (8, the recipe's)")
    parser.add_argument("--steps", type=int, default=300, help="steps of a run (300)")
    parser.add_argument("--batch", type=int, default=8, help="images per step and process (8)")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of weights and batches (2)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/powersgd.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, options), WORLD)
        runs = json.loads((Path(folder) / "found.json").read_text())
    table = summarize(runs)
    write_json(
        options.out,
        {
            "command": f"python benchmarks/powersgd.py --width {options.width} --layers {options.layers} "
            f"--steps {options.steps} --batch {options.batch} "
            f"--seeds {options.seeds}",
            "network": asdict(network(options.width, options.layers)),
            "processes": WORLD,
            "results": table,
            "curves, means of 20 steps": {n: [entry["train"] for entry in entries] for n, entries in runs.items()},
            "cores": os.cpu_count(),
            "device": platform.processor() or platform.machine(),
            "threads of a process": 1,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "date": datetime.now(UTC).date().isoformat(),
        },
    )
    plot(runs, options.out.with_suffix(".png"))
    for name, row in table.items():
        print(
            f"{name:34} train {row['train, last quarter']:.4f} ({row['train, last quarter, gap']['mean']:+.4f})   "
            f"val-styles {row['val-styles']:.4f} ({row['val-styles, gap']['mean']:+.4f})   "
            f"{row['bytes per step'] / 1e6:.2f} MB"
        )


if __name__ == "__main__":
    main()
