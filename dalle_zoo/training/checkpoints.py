"""Resumable checkpoints of a run, each written atomically."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer, callbacks

from dalle_zoo.files import atomic_write
from dalle_zoo.training.averaging import STATE
from dalle_zoo.training.sharded import is_sharded, read_state, read_unsharded, remove
from dalle_zoo.training.strategies.states import by_number
from dalle_zoo.weights import save_weights
from dalle_zoo.workspaces import remove_abandoned


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name in the same folder, and renames it once it is on the disk.

    Lightning writes to the system's temporary folder and moves the file. If that is another disk, moving copies, and
    a run killed meanwhile leaves half a checkpoint under the final name.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Writes the file ``path``; ``storage_options`` are not supported, as in the base class."""
        if storage_options is not None:
            raise TypeError(f"storage_options must be None, got {storage_options!r}: checkpoints are local files")
        with atomic_write(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a file, or the folder of shards of a sharded run."""
        path = Path(path)
        if is_sharded(path):
            return unsharded_checkpoint(path)
        return super().load_checkpoint(path, map_location or (lambda storage, _: storage), weights_only)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Removes a file or a folder, without leaving half of it under its name."""
        remove(Path(path))


def unsharded_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a folder of shards as the checkpoint of an unsharded run, in a single process."""
    checkpoint, tensors = read_state(path), read_unsharded(path)
    checkpoint["state_dict"] = tensors.pop("model")
    checkpoint["optimizer_states"] = [
        by_number(tensors.pop(f"optimizer_{number}", {}), groups)
        for number, groups in enumerate(checkpoint.pop("optimizer_groups"))
    ]
    return {**checkpoint, **tensors}


def consolidate(path: Path, folder: Path, *, averaged: bool = True) -> str:
    """Writes the weights of a checkpoint of any strategy as a component folder of a model.

    It runs in a single process and needs memory for the weights only.

    Args:
        path: Checkpoint: a file, or a folder of shards.
        folder: Existing folder to write to.
        averaged: Whether to prefer averaged weights, if there are any. Defaults to True.

    Returns:
        The stage, "dvae" or "prior".

    Raises:
        ValueError: The path is no checkpoint of a dVAE or a prior.
    """
    if is_sharded(path):
        checkpoint = read_state(path)
        weights = read_unsharded(path, f"{STATE}/").get(STATE, {}) if averaged else {}
        weights = weights or read_unsharded(path, "model/")["model"]
    else:
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        weights = (checkpoint.get(STATE) if averaged else None) or checkpoint.get("state_dict", {})
    described = checkpoint.get("dalle_zoo", {})
    if described.get("stage") not in ("dvae", "prior"):
        raise ValueError(f"{path} must be a checkpoint of a dVAE or a prior, got {described or 'another file'}")
    config = {"type": described["stage"], **described["config"]}
    prefix = "net."
    tensors = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    save_weights(tensors, config, folder)
    return str(described["stage"])


class Checkpoint(callbacks.Checkpoint):
    """Writes resumable checkpoints, named by their step, and keeps the newest two.

    The last step of a run gets a checkpoint, whether max_steps, max_epochs, max_time or a callback ends the run.

    Lightning's ModelCheckpoint is not used: at the end of an epoch it delays a checkpoint until the next validation,
    which may fall between the batches of an accumulated step, and a checkpoint has no accumulated gradients.

    Args:
        every: Optimizer steps between checkpoints.
    """

    def __init__(self, every: int = 1000) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.every = every
        self.folder: Path | None = None
        self._steps_before = 0
        self._saved = -1
        self._stopping = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes incomplete checkpoints of a run that was killed while it wrote or removed one."""
        if trainer.is_global_zero and self.folder is not None:
            remove_abandoned(self.folder)
            for left in [*self.folder.glob(".*.part"), *self.folder.glob(".*.old")]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Records the number of steps before the batch."""
        self._steps_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves after an optimizer step, if it is due, and removes all but one of the older checkpoints."""
        step = trainer.global_step
        # Lightning would stop between the batches of an accumulated step: complete the step first.
        self._stopping |= trainer.should_stop
        trainer.should_stop = self._stopping and step > self._steps_before
        last = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        due = step % self.every == 0 or step == trainer.max_steps or last or self._stopping
        if self.folder is None or step == self._steps_before or not due:
            return
        path = self.folder / f"{step:08d}.ckpt"
        trainer.save_checkpoint(path)  # returns after all processes have written
        self._saved = step
        if trainer.is_global_zero:
            for old in [other for other in list_checkpoints(self.folder) if other.name < path.name][:-1]:
                trainer.strategy.remove_checkpoint(old)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Delays a stop requested by validation by one step, after which a checkpoint is saved."""
        if trainer.should_stop and self.folder is not None and self._saved < trainer.global_step:
            self._stopping, trainer.should_stop = True, False


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    return sorted(folder.glob("*.ckpt"))


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the highest step in a run folder, or None."""
    return next(reversed(list_checkpoints(run / "checkpoints")), None)
