"""Runs cases of several processes each, as a script: ``python processes.py cases.json``.

Importing what training needs takes seconds, so one process does it and forks all others. A case trains a small prior
with a strategy on batches that do not depend on the number of processes, and writes what came of it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.training.averaging import WeightEMA
from dalle_zoo.training.base import deferred_weights
from dalle_zoo.training.callbacks import ImageLogger
from dalle_zoo.training.checkpoints import AtomicCheckpointIO, unsharded_checkpoint
from dalle_zoo.training.finite import FiniteGuard
from dalle_zoo.training.integrity import list_checkpoints
from dalle_zoo.training.optimizer import AdamWConfig
from dalle_zoo.training.prior_module import PriorModule
from dalle_zoo.training.saving import Checkpoint
from dalle_zoo.training.schedules import LearningRate
from dalle_zoo.training.strategies import defers_weights
from dalle_zoo.training.strategy_hooks import hooks_of
from dalle_zoo.training.trainer import ZooTrainer

CONFIG = PriorConfig(text_length=4, text_vocab=10, image_height=2, image_width=4, codebook_size=7, width=32,
                     num_layers=2, num_heads=2)  # fmt: skip
GLOBAL_BATCH = 8
STEPS = 20


def usual_initial(self: Prior, name: str) -> tuple[float, float]:
    """Weights with which no gradient is 0: the heads' are, by default."""
    return (1.0, 0.1) if name.endswith("norm.weight") else (0.0, 0.1)


class Batches:
    """Batch k of the complete world, of which each process has its part; it goes on where a state says."""

    def __init__(self, rank: int, world: int) -> None:
        share = GLOBAL_BATCH // world
        self.part = slice(rank * share, (rank + 1) * share)
        self.done = 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index in range(self.done, STEPS):
            self.done = index + 1
            yield self.batch(index)

    def batch(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(10, (GLOBAL_BATCH, 4), generator=generator)
        padding = torch.arange(4) >= torch.randint(1, 5, (GLOBAL_BATCH, 1), generator=generator)
        text = torch.where(padding, torch.arange(4) + 10, text)
        codes = torch.randint(7, (GLOBAL_BATCH, 2, 4), generator=generator)
        return {"text": text[self.part], "codes": codes[self.part]}

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Recorder(Callback):
    """Loss of every step, and the gradients of some, complete and averaged over all processes."""

    def __init__(self, at: list[int], pace: float, out: Path) -> None:
        self.at, self.pace, self.out = at, pace, out
        self.losses: list[float] = []
        self.gradients: dict[int, dict[str, Tensor]] = {}
        self.norms: dict[int, float] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.pace and trainer.is_global_zero:
            with (self.out / "updates").open("a") as file:
                file.write(f"{trainer.global_step}\n")
        time.sleep(self.pace)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone())))


def unsharded(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, which may be sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Pixels(torch.nn.Module):
    """Stands for an image tokenizer: each code is a pixel of its brightness."""

    def decode(self, codes: Tensor) -> Tensor:
        return (codes[:, None] / CONFIG.codebook_size).expand(-1, 3, -1, -1)


class RecordingModule(PriorModule):
    """Shows gradients as the optimizer gets them, before they are clipped."""

    recorder: Recorder

    def configure_gradient_clipping(self, optimizer: Any, *arguments: Any, **options: Any) -> None:
        model = self.trainer.strategy.model
        flat = isinstance(model, FullyShardedDataParallel)
        if self.global_step in self.recorder.at:
            self.recorder.norms[self.global_step] = float(hooks_of(self.trainer.strategy).gradient_norm(self))
            context = FullyShardedDataParallel.summon_full_params(model, with_grads=True) if flat else nullcontext()
            with context:
                self.recorder.gradients[self.global_step] = {
                    name.replace("_fsdp_wrapped_module.", ""): unsharded(parameter.grad)
                    for name, parameter in self.net.named_parameters()
                    if parameter.grad is not None
                }
        super().configure_gradient_clipping(optimizer, *arguments, **options)


def train(case: dict[str, Any], rank: int, world: int) -> None:
    """One process of a case."""
    torch.manual_seed(case.get("seed", 0))
    Prior.initial = usual_initial  # type: ignore[method-assign]
    out = Path(case["out"])
    deferred = deferred_weights() if defers_weights(case["strategy"]) else nullcontext()
    with deferred:
        module = RecordingModule(
            CONFIG,
            adamw=AdamWConfig(beta2=0.96, weight_decay=4.5e-2, variance_clip=5.0),
            learning_rate=LearningRate(peak=1e-2, warmup_steps=2, decay="constant"),
            recompute=case.get("recompute", False),
            compile=case.get("compile", False),
        )
    module.recorder = recorder = Recorder(case.get("gradients_at", []), case.get("pace", 0.0), out)
    checkpoint = Checkpoint(every=case.get("every", 10))
    checkpoint.folder = out / "checkpoints"
    images = ImageLogger(count=GLOBAL_BATCH // 2)
    if case.get("validate"):
        module._frozen, images.folder = (Pixels(),), out / "images"  # type: ignore[assignment]
    trainer = ZooTrainer(
        strategy=case["strategy"],
        precision=case.get("precision"),
        accelerator="cpu",
        devices=world,
        max_steps=case.get("steps", STEPS),
        gradient_clip_val=case.get("clip"),
        val_check_interval=5,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        callbacks=[FiniteGuard(), recorder, checkpoint, WeightEMA(decay=0.5), images],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    measured = [Batches(rank, world).batch(index) for index in range(2)]
    validation = DataLoader(measured, batch_size=None) if case.get("validate") else None  # type: ignore[arg-type]
    trainer.fit(module, Batches(rank, world), validation, ckpt_path=case.get("resume"))
    weights = hooks_of(trainer.strategy).unsharded_weights("net.")
    if weights is None:
        weights = {name: tensor.clone() for name, tensor in module.net.state_dict().items()}
    measured = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    if rank == 0:
        torch.save(
            {
                "measured": measured,
                "losses": recorder.losses,
                "gradients": recorder.gradients,
                "norms": recorder.norms,
                "weights": weights,
            },
            out / "result.pt",
        )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(case: dict[str, Any]) -> list[int]:
    """Forks the processes of a case."""
    world = case["world"]
    Path(case["out"]).mkdir(parents=True, exist_ok=True)
    port = free_port()
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world), "NODE_RANK": "0", "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0",
            }  # fmt: skip
            if world > 1:
                os.environ |= {"TORCHELASTIC_RUN_ID": "test"}
            status = 1
            try:
                train(case, rank, world)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return children


def run(case: dict[str, Any]) -> None:
    """Runs a case to its end."""
    children = start(case)
    for child in children:
        status = os.waitpid(child, 0)[1]
        if status:
            kill([other for other in children if other != child])
            raise SystemExit(f"{case}: a process ended with {status}")


def kill(children: list[int]) -> None:
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue


def run_killed(case: dict[str, Any], kills: int) -> None:
    """Kills the processes of a case several times, once at a random moment, and inspects what is left."""
    rng = random.Random(0)
    folder, updates = Path(case["out"]) / "checkpoints", Path(case["out"]) / "updates"
    newest: list[str] = []
    while len(newest) < kills:
        updates.unlink(missing_ok=True)
        children = start(
            {**case, **({"resume": str(list_checkpoints(folder)[-1])} if list_checkpoints(folder) else {})}
        )
        wanted = rng.choice([1, 1, 2])  # updates that this life begins, so that the run does not end too soon
        while not updates.exists() or len(updates.read_text().splitlines()) < wanted:
            if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
                raise SystemExit("the run ended by itself")
            time.sleep(0.001)
        time.sleep(rng.uniform(0, case["pace"]))
        kill([rng.choice(children)])
        time.sleep(rng.uniform(0, 0.02))
        kill(children)  # the others cannot go on
        for child in children:
            os.waitpid(child, 0)
        for state in list_checkpoints(folder):  # whatever has the name of a checkpoint is a complete one
            assert unsharded_checkpoint(state)["state_dict"].keys(), state
        newest.append(list_checkpoints(folder)[-1].name if list_checkpoints(folder) else "")
    run({**case, "resume": str(list_checkpoints(folder)[-1])})
    sys.stdout.write(json.dumps({"kills": kills, "newest": newest}) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    if "--kills" in sys.argv:
        run_killed(cases[0], int(sys.argv[-1]))
    else:
        for each in cases:
            run(each)
