"""Trains small priors under precisions, in one process or two: what came of each case goes to FOLDER/NAME.pt.

    python tests/training/precision_processes.py FOLDER

`test_precision.py` starts it and checks what was found; it also uses `train` itself, for one process.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dalle_zoo.models.initial import local
from dalle_zoo.models.prior import PriorConfig
from dalle_zoo.training.optimizer import AdamWConfig
from dalle_zoo.training.precision import ResblockPrecision, make_precision
from dalle_zoo.training.prior_module import PriorModule
from dalle_zoo.training.schedules import LearningRate
from dalle_zoo.training.strategies import make_strategy

CONFIG = PriorConfig(
    text_length=4, text_vocab=10, image_height=2, image_width=4, codebook_size=7, width=16, num_layers=2, num_heads=2
)
GLOBAL_BATCH = 4
STEPS, EPOCH = 6, 3
TOGETHER = 4
"""Cases that run at a time: they wait for each other's processes more than they compute."""
SPOILED = "layers.1.attention.qkv.weight"
"""Parameter of block 2."""

CASES: dict[str, dict[str, Any]] = {
    "one": {"carrier": "float32"},
    "ddp": {"carrier": "float32", "strategy": "ddp"},
    "fsdp2": {"carrier": "float32", "strategy": "fsdp2"},
    "fsdp2 recomputed": {"carrier": "float32", "strategy": "fsdp2", "recompute": True},
    "one float16": {"carrier": "float16"},
    "ddp float16": {"carrier": "float16", "strategy": "ddp"},
    "fsdp2 float16": {"carrier": "float16", "strategy": "fsdp2"},
    "one spoiled": {"carrier": "emulated", "spoil": {2: SPOILED}},
    "ddp spoiled": {"carrier": "emulated", "strategy": "ddp", "spoil": {2: SPOILED}},
    "fsdp2 spoiled": {"carrier": "emulated", "strategy": "fsdp2", "spoil": {2: SPOILED}},
    "ddp_powersgd spoiled": {"carrier": "emulated", "strategy": "ddp_powersgd(rank=2)", "spoil": {2: SPOILED}},
    "fsdp2 resumed": {"carrier": "emulated", "strategy": "fsdp2", "spoil": {2: SPOILED}, "resume": True},
    "fsdp2 16-mixed spoiled": {"precision": "16-mixed", "strategy": "fsdp2", "spoil": {2: SPOILED}},
    "fsdp 32-true": {"precision": "32-true", "strategy": "fsdp"},
    "fsdp bf16-mixed": {"precision": "bf16-mixed", "strategy": "fsdp"},
    "fsdp bf16-true": {"precision": "bf16-true", "strategy": "fsdp"},
    "fsdp2 bf16-mixed": {"precision": "bf16-mixed", "strategy": "fsdp2"},
    "fsdp2 bf16-true": {"precision": "bf16-true", "strategy": "fsdp2"},
    "one bf16-mixed": {"precision": "bf16-mixed"},
    "one bf16-true": {"precision": "bf16-true"},
}


class Batches(Dataset[dict[str, Tensor]]):
    """The part that a process has of the batch of the world: always the same, wherever a resumed loader begins."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        share = GLOBAL_BATCH // world
        self.part = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return EPOCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(10, (GLOBAL_BATCH, 4), generator=generator)
        codes = torch.randint(7, (GLOBAL_BATCH, 2, 4), generator=generator)
        return {"text": text[self.part], "codes": codes[self.part]}


class Recorder(Callback):
    """What each step saw; and gradients that it makes infinite, in the last process alone.

    Args:
        spoil: Update to the parameter of which one number becomes infinite after the backward pass.
    """

    def __init__(self, spoil: Mapping[int, str]) -> None:
        self.spoil = spoil
        self.gradients: dict[str, Tensor] = {}
        self.losses: list[float] = []
        self.finite: list[bool] = []
        self.before: list[dict[str, Tensor]] = []

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step in self.spoil and trainer.global_rank == trainer.world_size - 1:
            gradient = pl_module.net.get_parameter(self.spoil[trainer.global_step]).grad
            local(gradient).view(-1)[-1] = torch.inf

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if isinstance(trainer.precision_plugin, ResblockPrecision):
            self.finite.append(bool(trainer.precision_plugin.finite))
        if trainer.global_step == 0:
            self.gradients = {n: unsharded(p.grad) for n, p in pl_module.net.named_parameters() if p.grad is not None}
        self.before.append(snapshot(pl_module, optimizer))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone())))


class Saver(Callback):
    """Writes a checkpoint when an epoch ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)


def unsharded(tensor: Tensor) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]
    return full.detach().clone()


def snapshot(module: Any, optimizer: Any) -> dict[str, Tensor]:
    """Weights and moments of this process, copies."""
    retained = {}
    for name, parameter in module.net.named_parameters():
        retained[name] = local(parameter.detach()).clone()
        for key, moment in optimizer.state.get(parameter, {}).items():
            retained[f"{name}/{key}"] = local(moment).clone()
    return retained


def make_module(recompute: bool = False, **options: Any) -> PriorModule:
    """A prior in which every weight counts."""
    torch.manual_seed(0)
    rate = LearningRate(peak=1e-2, warmup_steps=1, decay="constant")
    module = PriorModule(CONFIG, adamw=AdamWConfig(beta2=0.9), learning_rate=rate, recompute=recompute, **options)
    with torch.no_grad():
        for parameter in module.net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def train(
    precision: Precision,
    strategy: str | None = None,
    spoil: Mapping[int, str] | None = None,
    rank: int = 0,
    world: int = 1,
    module: PriorModule | None = None,
    ckpt_path: Path | None = None,
    callbacks: tuple[Callback, ...] = (),
    **options: Any,
) -> tuple[Trainer, Recorder, PriorModule]:
    """Trains for `STEPS` updates."""
    recorder = Recorder(spoil or {})
    settings = {"max_steps": STEPS, "limit_val_batches": 0, "logger": False, "enable_checkpointing": False}
    trainer = Trainer(
        strategy=make_strategy(strategy) if strategy else "auto",
        plugins=[precision],
        accelerator="cpu",
        devices=world,
        gradient_clip_val=0.5,
        callbacks=[recorder, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **(settings | options),
    )
    module = module or make_module()
    loader = DataLoader(Batches(rank, world), batch_size=None)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer, recorder, module


def make_case_precision(case: dict[str, Any]) -> Precision:
    if "carrier" in case:
        return ResblockPrecision(case["carrier"])
    if case["precision"] == "16-mixed":  # which by name is refused on the CPU, where it is too slow for real networks
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    strategy = case.get("strategy")
    return make_precision(case["precision"], "cpu", strategy if strategy in ("fsdp", "fsdp2") else "plain")


def run(case: dict[str, Any], rank: int, world: int, checkpoint: Path) -> dict[str, Any]:
    """One process of a case: what it found."""
    options = {"strategy": case.get("strategy"), "spoil": case.get("spoil"), "rank": rank, "world": world}
    if case.get("resume"):
        train(make_case_precision(case), **options, max_steps=EPOCH, callbacks=(Saver(checkpoint),))
        options["ckpt_path"] = checkpoint
    precision, gathers = make_case_precision(case), count_gathers()
    _, recorder, _ = train(precision, **options, module=make_module(case.get("recompute", False)))
    found = {
        "losses": recorder.losses,
        "finite": recorder.finite,
        "gradients": recorder.gradients,
        "gathers": gathers[0],
        "unchanged": [equal(a, b) for a, b in zip(recorder.before, recorder.before[1:], strict=False)],
    }
    if isinstance(precision, ResblockPrecision):
        found["state"] = precision.state_dict()
    return found


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def count_gathers() -> list[int]:
    """A counter of all-gathers from here on, by whichever name this PyTorch's fully_shard calls them."""
    counter = [0]
    for name in ("all_gather_into_tensor", "all_gather_single"):
        gather = getattr(torch.distributed, name, None)

        def counting(*arguments: Any, gather: Any = gather, **options: Any) -> Any:
            counter[0] += 1
            return gather(*arguments, **options)

        if gather is not None:
            setattr(torch.distributed, name, counting)
    return counter


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fork(name: str, folder: Path) -> list[int]:
    """Starts the processes of a case: importing what they need takes seconds, so they are forks of this one."""
    case, port, children = CASES[name], free_port(), []
    world = 2 if "strategy" in case else 1
    for rank in range(world):
        child = os.fork()
        if child == 0:
            if world > 1:
                os.environ |= {
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0",
                    "TORCHELASTIC_RUN_ID": "test",
                }  # fmt: skip
            status = 1
            try:
                torch.save(run(case, rank, world, folder / f"{name}.ckpt"), folder / f"{name} {rank}.pt")
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return children


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = [*CASES]
    for start in range(0, len(names), TOGETHER):
        started = {name: fork(name, Path(sys.argv[1])) for name in names[start : start + TOGETHER]}
        for name, children in started.items():
            statuses = [os.waitpid(child, 0)[1] for child in children]
            if any(statuses):
                raise SystemExit(f"{name}: processes ended with {statuses}")
