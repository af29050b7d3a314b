"""Decides when a run saves a checkpoint, also before it ends because of SIGTERM."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, callbacks
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

from dalle_zoo.training.finite import agreed, check_weights
from dalle_zoo.training.integrity import list_checkpoints
from dalle_zoo.training.loggers import rewind
from dalle_zoo.workspaces import remove_abandoned

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a run that SIGTERM ended, as shells report it."""


class Checkpoint(callbacks.Checkpoint):
    """Writes resumable checkpoints, named by their step, and keeps the newest two.

    The last step of a run gets a checkpoint, whether max_steps, max_epochs, max_time, a callback or SIGTERM ends the
    run. A checkpoint that falls on a validation is saved after it: what a killed run has not saved, it does again, so
    no row and no image is missing. Weights that are not finite are never saved.

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
        self._waits_for_validation = False
        self._asked_to_end = False  # this process
        self._terminated = False  # the run: all processes know it in the same step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets early stopping decide after validations, since the end of an epoch is too late for a checkpoint."""
        for callback in trainer.callbacks if stage == "fit" else ():  # type: ignore[attr-defined]
            if isinstance(callback, callbacks.EarlyStopping):
                if callback._check_on_train_epoch_end:
                    raise ValueError("EarlyStopping must decide after validations: leave check_on_train_epoch_end out")
                callback._check_on_train_epoch_end = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handles SIGTERM from here on."""
        self._handle_sigterm()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes incomplete checkpoints of a killed run, and curves of steps that are trained again."""
        self._handle_sigterm()
        for logger in trainer.loggers:
            rewind(logger, trainer.global_step)
        if trainer.is_global_zero and self.folder is not None:
            remove_abandoned(self.folder)

    def _handle_sigterm(self) -> None:
        """Replaces Lightning's handler, which calls a collective from within another one, and then hangs."""

        def terminate(*_: Any) -> None:
            self._asked_to_end = True
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second signal ends the process at once

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)  # Lightning restores the handlers when the run ends

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Agrees with all processes whether one of them was asked to end."""
        self._terminated = not agreed(trainer, torch.tensor(not self._asked_to_end))

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
        # The run continues until min_steps and min_epochs.
        ends = self._terminated or (self._stopping and trainer.fit_loop._can_stop_early)
        due = step % self.every == 0 or step == trainer.max_steps or last or ends
        if step == self._steps_before or not due:
            return
        if not ends and validates_next(trainer):
            self._waits_for_validation = True
        else:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves a checkpoint that waits; delays a stop requested by validation by one step, which then saves one."""
        if self._waits_for_validation:
            self._stopping |= trainer.should_stop
            self._save(trainer)
        elif trainer.should_stop and self.folder is not None and self._saved < trainer.global_step:
            self._stopping, trainer.should_stop = True, False

    def _save(self, trainer: Trainer) -> None:
        self._waits_for_validation = False
        step = trainer.global_step
        if self.folder is not None:
            path = self.folder / f"{step:08d}.ckpt"
            check_weights(trainer.lightning_module, f"{path} is not written, and training stops")
            trainer.save_checkpoint(path, weights_only=False)  # returns after all processes have written
            self._saved = step
            if trainer.is_global_zero:
                for old in [other for other in list_checkpoints(self.folder) if other.name < path.name][:-1]:
                    trainer.strategy.remove_checkpoint(old)
        if self._terminated:
            raise SIGTERMException(TERMINATED)

    # ------------------------------------------------------------ runs that a callback has ended

    def state_dict(self) -> dict[str, Any]:
        """Whether a callback other than a limit of time has ended the run."""
        return {"stopped": self._stopping}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Drops the mark of a run that ended by its limit of time, which may be extended."""
        timers = [c for c in trainer.callbacks if isinstance(c, callbacks.Timer)]  # type: ignore[attr-defined]
        if any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers):
            checkpoint["callbacks"][self.state_key]["stopped"] = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Ends a run at once that early stopping has ended before."""
        stopped = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("stopped", False)
        early = [c for c in trainer.callbacks if isinstance(c, callbacks.EarlyStopping)]  # type: ignore[attr-defined]
        if stopped and early and trainer.state.fn == TrainerFn.FITTING:
            trainer.should_stop = True


def validates_next(trainer: Trainer) -> bool:
    """Returns whether a validation follows the current batch by its number, before the next batch."""
    epoch_loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None or trainer._val_check_time_interval is not None:  # type: ignore[attr-defined]
        return False  # by time: a resumed run validates at another step
    return epoch_loop._should_check_val_fx(fetcher) and not epoch_loop.val_loop.skip
