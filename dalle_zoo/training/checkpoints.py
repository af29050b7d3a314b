"""Resumable states of a run, each file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it when it has reached the disk.

    Lightning's own writes to the system's folder for temporary files and moves the file from there, which copies it
    when that is another disk: a run killed meanwhile leaves half a checkpoint under the final name.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Writes the file ``path``; ``storage_options`` are not supported, as in the base class."""
        if storage_options is not None:
            raise TypeError(f"storage_options must be None, got {storage_options!r}: checkpoints are local files")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.part")
        with aside.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)


class Checkpoint(ModelCheckpoint):
    """Resumable states, named by the update: the newest two, and that of the last update.

    Args:
        every: Updates between two states.
    """

    def __init__(self, every: int = 1000) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 update, got {every}")
        super().__init__(
            filename="{step:08d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every,
            monitor="step",
            mode="max",
            save_top_k=2,
            enable_version_counter=False,  # a state is a function of the update: its file may be written again
        )
        self.every = every
        self._updates = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the update that the batch belongs to."""
        self._updates = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves behind an update, never between the batches of an accumulated one: gradients are not saved."""
        if trainer.global_step == self._updates:
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # What validates the run, or goes on with more updates, starts from its last state.
        if trainer.global_step == trainer.max_steps and trainer.global_step % self.every:
            trainer.save_checkpoint(self.format_checkpoint_name({"step": torch.tensor(trainer.global_step)}))


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the highest update in a run folder, or None."""
    found = sorted((run / "checkpoints").glob("*.ckpt"))
    return found[-1] if found else None
