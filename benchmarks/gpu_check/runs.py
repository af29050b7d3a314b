"""Stages that run complete programs: the tests, and short training runs through the trainer."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu_check.check import Check
from dalle_zoo.models.prior import PriorConfig

ROOT = Path(__file__).parents[2]
WINDOW = 20
"""Updates over which losses are averaged before they are compared."""
CLOSE = 0.02
"""Largest difference allowed between the mean losses of two precisions, as a share of the loss."""
SHARDED = 0.01
"""Largest difference allowed between the losses of a sharded and an unsharded network, as a share of the loss."""


def tests(check: Check) -> None:
    """Runs the tests marked ``gpu``; without a GPU pytest skips them."""
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        arguments = ["-q", "-m", "gpu", "--no-header", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
        subprocess.run(
            [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, timeout=check.seconds_left - 1, check=False
        )
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    outcomes = {f"{case.get('classname')}::{case.get('name')}": _outcome(case) for case in cases}
    count = {kind: sum(kind == outcome for outcome, _ in outcomes.values()) for kind in ("passed", "skipped")}
    failed = {name: text for name, (outcome, text) in outcomes.items() if outcome == "failed"}
    check.add("tests that pass", count["passed"], "tests", least=None if check.device == "cpu" else len(outcomes))
    check.add("tests that are skipped", count["skipped"], "tests", most=None if check.device == "cpu" else 0)
    check.add("tests that fail", len(failed), "tests", most=0, failed=failed)


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for kind, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            return outcome, (found.text or found.get("message") or "")[-3000:]
    return "passed", ""


# ------------------------------------------------------------ training runs


class Batches:
    """Batches of a language that can be learned: each code is a function of the one before it and of the caption."""

    def __init__(self, config: PriorConfig, batch: int, count: int) -> None:
        self.config, self.batch, self.count = config, batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import torch

        c = self.config
        for index in range(self.count):
            generator = torch.Generator().manual_seed(index)
            text = torch.randint(c.text_vocab, (self.batch, c.text_length), generator=generator)
            steps = (text[:, :1] + torch.arange(c.image_length) * (1 + text[:, 1:2] % 3)) % c.codebook_size
            noise = torch.rand(steps.shape, generator=generator) < 0.1
            codes = torch.where(noise, torch.zeros_like(steps), steps)
            yield {"text": text, "codes": codes.view(self.batch, c.image_height, c.image_width)}


def train(
    check: Check, config: PriorConfig, batch: int, updates: int, precision: str, strategy: str
) -> dict[str, Any]:
    """Trains a prior from the same weights on the same batches.

    Returns:
        ``losses`` of all updates, ``seconds`` per update, and of `16-resblock` ``scales``, the base-2 logarithms, and
        ``skipped``, the number of skipped steps.
    """
    import torch
    from lightning.pytorch import Callback

    from dalle_zoo.training.averaging import WeightEMA
    from dalle_zoo.training.base import deferred_weights
    from dalle_zoo.training.finite import FiniteGuard
    from dalle_zoo.training.precision import ResblockPrecision
    from dalle_zoo.training.prior_module import PriorModule
    from dalle_zoo.training.schedules import LearningRate
    from dalle_zoo.training.strategies import defers_weights
    from dalle_zoo.training.trainer import ZooTrainer

    losses, times = [], []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(outputs["loss"].detach().clone())
            times.append(time.perf_counter())

    torch.manual_seed(0)
    with deferred_weights() if defers_weights(strategy) else nullcontext():
        rate = LearningRate(peak=1e-3, warmup_steps=min(20, updates // 4), decay="constant")
        module = PriorModule(config, learning_rate=rate)
    trainer = ZooTrainer(
        strategy=strategy, precision=precision, accelerator=check.device, devices=1, max_steps=updates,
        gradient_clip_val=4.0, callbacks=[FiniteGuard(), Recorder(), WeightEMA(decay=0.99)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, Batches(config, batch, updates))
    found: dict[str, Any] = {"losses": [float(loss) for loss in losses]}
    later = times[len(times) // 2 :]
    found["seconds"] = (later[-1] - later[0]) / max(len(later) - 1, 1)
    plugin = trainer.precision_plugin
    if isinstance(plugin, ResblockPrecision) and plugin.scales is not None:
        found |= {"scales": plugin.scales.values.log2().tolist(), "skipped": plugin.num_skipped}
    return found


def _configuration(check: Check) -> tuple[PriorConfig, int]:
    sizes = {"text_length": 16, "text_vocab": 64, "image_height": 8, "image_width": 8, "codebook_size": 64}
    if check.tiny:
        sizes |= {"text_length": 4, "image_height": 4, "image_width": 4}
        return PriorConfig(**sizes, width=32, num_layers=2, num_heads=2), 4
    return PriorConfig(**sizes, width=512, num_layers=12, num_heads=8), 32


def _apart(first: list[float], second: list[float], window: int) -> float:
    """Largest difference of the means over windows, as a share of the loss."""
    starts = range(0, len(first), window)
    means = [[sum(x[s : s + window]) / len(x[s : s + window]) for s in starts] for x in (first, second)]
    return max(abs(a - b) / a for a, b in zip(*means, strict=True))


def resblock(check: Check) -> None:
    """Compares the losses of the paper's precision with those of bfloat16, and reports its scales."""
    config, batch = _configuration(check)
    updates = 12 if check.tiny else 200
    bf16 = train(check, config, batch, updates, "bf16-mixed", "auto")
    check.add("bf16-mixed, first and last loss", bf16["losses"][-1], "nats", most=bf16["losses"][0], **bf16)
    paper = train(check, config, batch, updates, "16-resblock", "auto")
    check.add("16-resblock, first and last loss", paper["losses"][-1], "nats", most=paper["losses"][0], **paper)
    apart = _apart(bf16["losses"], paper["losses"], 4 if check.tiny else WINDOW)
    check.add("largest difference of the mean losses", apart, "of the loss", most=CLOSE)
    check.add("skipped steps", paper["skipped"], "steps", most=0.1 * updates)
    check.add("smallest gradient scale", min(paper["scales"]), "log2", least=7)
    check.add("largest gradient scale", max(paper["scales"]), "log2", most=24)
    check.add("time of an update, 16-resblock / bf16-mixed", paper["seconds"] / bf16["seconds"], "x")


def fsdp(check: Check) -> None:
    """Compares `fsdp2` on one rank with the unsharded network."""
    config, batch = _configuration(check)
    updates = 6 if check.tiny else 40
    plain = train(check, config, batch, updates, "bf16-mixed", "auto")
    for precision in ("bf16-mixed", "16-resblock"):
        sharded = train(check, config, batch, updates, precision, "fsdp2")
        limit = SHARDED if precision == "bf16-mixed" else CLOSE
        apart = _apart(plain["losses"], sharded["losses"], updates // 2)
        check.add(f"fsdp2, {precision}, difference of the mean losses", apart, "of the loss", most=limit, **sharded)
        check.add(f"fsdp2, {precision}, time of an update / unsharded", sharded["seconds"] / plain["seconds"], "x")
