"""Curves and images of a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger

from dalle_zoo.images import save_png
from dalle_zoo.training.base import StageModule


def default_loggers(run: Path) -> list[Logger]:
    """Returns loggers that write curves as CSV, and to TensorBoard if it is installed."""
    loggers: list[Logger] = [CSVLogger(run, name="metrics", flush_logs_every_n_steps=1)]
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
