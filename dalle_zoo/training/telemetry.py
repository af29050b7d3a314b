"""Speed, memory and the state of the optimizer, logged next to the losses."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dalle_zoo.data import ResumableLoader
from dalle_zoo.planning.duration import computes_in
from dalle_zoo.planning.hardware import GPU, MFU, recognize_gpu
from dalle_zoo.planning.plan import Hardware, Plan
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.workload import Workload

GIB = 2**30


class Telemetry(Callback):
    """Logs what a run achieves, whenever the trainer logs.

    | curve | meaning |
    |---|---|
    | ``speed/{steps,images,tokens}_per_second`` | of all processes, without the time of validations |
    | ``speed/data_wait`` | share of the time in which process 0 waits for its next batch |
    | ``speed/tflops`` | model operations of one process, 10^12 per second; masks count exactly the allowed pairs |
    | ``speed/mfu`` | ``tflops`` as a share of the GPU's peak; only for GPUs that `dalle-zoo plan` knows |
    | ``plan/tokens_per_second``, ``plan/mfu`` | what `dalle-zoo plan` predicts for this recipe and GPU |
    | ``memory/gib`` | largest memory of tensors on the GPU so far, or the memory of the process |
    | ``train/loss_scale`` | of precision 16-mixed |

    The norm of the gradients is ``train/gradient_norm``, see `StageModule.on_before_optimizer_step`.

    Args:
        enabled: Whether to log them.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.work: Workload | None = None
        """What the recipe trains, which counts the operations of a sample; None for a stage that has no count."""
        self.planned: Setup | None = None
        """How the recipe trains, for the prediction; None without one."""
        self._gpu: GPU | None = None
        self._constant: dict[str, float] = {}
        self._reset()

    def _reset(self, trainer: Trainer | None = None) -> None:
        self._since = time.perf_counter()
        self._samples = self._paused = 0.0
        self._step = 0 if trainer is None else trainer.global_step
        self._waited = 0.0 if trainer is None else waited(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predicts the speed on a known GPU."""
        if not self.enabled:
            return
        device = trainer.strategy.root_device
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self._gpu = recognize_gpu(properties.name, properties.total_memory / GIB)
        if self.work is not None and self._gpu is not None and self.planned is not None:
            self._constant = predicted(Plan(self.work, self.planned, Hardware(gpu=self._gpu, mfu=MFU)))
        self._reset(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._paused -= time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continues it."""
        self._paused += time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts samples, and logs when it is due."""
        if not self.enabled:
            return
        self._samples += len(batch["key"]) if isinstance(batch, dict) and "key" in batch else 0
        if trainer._logger_connector.should_update_logs and trainer.global_step > self._step:
            pl_module.log_dict(self.measured(trainer), batch_size=1)
            self._reset(trainer)

    def measured(self, trainer: Trainer) -> dict[str, float]:
        """Returns the metrics of the time since the last call of `_reset`."""
        seconds = max(time.perf_counter() - self._since - self._paused, 1e-9)
        images = self._samples / seconds
        found = {
            "speed/steps_per_second": (trainer.global_step - self._step) / seconds,
            "speed/images_per_second": images * trainer.world_size,
            "speed/data_wait": min((waited(trainer) - self._waited) / seconds, 1.0),
            "memory/gib": memory_in_use(trainer.strategy.root_device) / GIB,
            **self._constant,
        }
        if self.work is not None:
            found["speed/tokens_per_second"] = images * trainer.world_size * self.work.tokens
            found["speed/tflops"] = images * self.work.flops.model / 1e12
            if self._gpu is not None and self.planned is not None:
                found["speed/mfu"] = found["speed/tflops"] / peak_tflops(self._gpu, self.planned)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            found["train/loss_scale"] = scaler.get_scale()
        return found


def predicted(plan: Plan) -> dict[str, float]:
    """Returns the curves of a plan: constants, to be seen next to the measured ones."""
    duration, utilization = plan.duration(), plan.utilization
    assert duration is not None, "a plan for a GPU has times"
    assert utilization is not None
    tokens = plan.setup.samples * plan.work.tokens / duration.total
    return {"plan/tokens_per_second": tokens, "plan/mfu": utilization}


def peak_tflops(gpu: GPU, setup: Setup) -> float:
    """Returns the peak rate of a GPU in the dtype of the branches; float32 for a dtype that it lacks."""
    return gpu.tflops.get(computes_in(setup), gpu.tflops["float32"])


def waited(trainer: Trainer) -> float:
    """Returns the seconds that this process has waited for training batches so far."""
    loader = trainer.train_dataloader
    return loader.waited if isinstance(loader, ResumableLoader) else 0.0


def memory_in_use(device: torch.device) -> int:
    """Returns the largest memory of tensors on a GPU so far, or the resident memory of this process, bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.is_file() else 0
