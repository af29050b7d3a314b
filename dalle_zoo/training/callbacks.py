"""Curves and images of a run, and what it prints."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar
from lightning.pytorch.loggers import Logger

from dalle_zoo.images import save_png
from dalle_zoo.training.base import StageModule
from dalle_zoo.training.curves import CurveLogger

log = logging.getLogger(__name__)


class ParameterCount(ModelSummary):
    """Logs the number of parameters in one line. Lightning's table lists one network, and no FLOPs of it."""

    @staticmethod
    def summarize(
        summary_data: Any, total_parameters: int, trainable_parameters: int, *args: Any, **kwargs: Any
    ) -> None:
        """Logs the line on process 0."""
        log.warning("%s parameters, %s of them trained", f"{total_parameters:,}", f"{trainable_parameters:,}")


class EpochProgressBar(RichProgressBar):
    """Lightning's progress bar, which names the last epoch only if there is a limit of epochs."""

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        text = f"Epoch {current_epoch}" if last in (None, -1) else f"Epoch {current_epoch}/{last - 1}"
        return text.ljust(len(self.validation_description))


def quieter(callback: Callback) -> Callback:
    """Returns this module's replacement of Lightning's summary or progress bar, or the callback itself."""
    if isinstance(callback, ModelSummary):
        return ParameterCount()
    return EpochProgressBar() if type(callback) is RichProgressBar else callback


def default_loggers(run: Path) -> list[Logger]:
    """Returns loggers that write curves as CSV, and to TensorBoard if it is installed."""
    loggers: list[Logger] = [CurveLogger(run)]
    if importlib.util.find_spec("tensorboard") is not None:
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(run, name="tensorboard", version=0))
    return loggers


class ImageLogger(Callback):
    """Generates reconstructions or samples at every validation, with the averaged weights if there are any.

    They are saved as ``images/<name>-<step>.png`` in the run folder, and in TensorBoard if it is installed.

    Args:
        enabled: Whether to generate images.
        count: Maximum number of images per grid.
    """

    def __init__(self, enabled: bool = True, count: int = 8) -> None:
        self.enabled = enabled
        self.count = count
        self.folder: Path | None = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Generates images for the first batch, with the weights that validation uses."""
        wanted = self.enabled and self.folder is not None and batch_idx == 0 and not trainer.sanity_checking
        if not wanted or not trainer.is_global_zero or not isinstance(pl_module, StageModule):
            return
        few = {k: v[: self.count] if hasattr(v, "__len__") else v for k, v in batch.items()}
        for name, grid in pl_module.sample_images(few).items():
            assert self.folder is not None
            save_png(grid, self.folder / f"{name}-{pl_module.optimizer_steps:08d}.png")
            for logger in trainer.loggers:
                add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
                if add_image is not None:
                    add_image(name, grid, pl_module.optimizer_steps)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Saves the images of every predicted batch."""
        if self.folder is None:
            return
        for name, grid in (outputs or {}).items():
            path = self.folder / f"predicted-{name}-{batch_idx:05d}-{trainer.global_rank}.png"
            save_png(grid, path)
