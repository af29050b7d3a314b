"""What a run prints: its progress over all steps with the remaining time, and the number of parameters."""

from __future__ import annotations

import logging
import math
import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, RichProgressBar, TQDMProgressBar
from tqdm import tqdm

log = logging.getLogger(__name__)

LOSS = "train/loss"
"""Metric that is shown. It is not logged with ``prog_bar``: Lightning would read it after every step, shown or not, so
that the host would wait for a GPU to complete the step."""


class ParameterCount(ModelSummary):
    """Logs the number of parameters in one line. Lightning's table lists one network, and no FLOPs of it."""

    @staticmethod
    def summarize(
        summary_data: Any, total_parameters: int, trainable_parameters: int, *args: Any, **kwargs: Any
    ) -> None:
        """Logs the line on process 0."""
        log.warning("%s parameters, %s of them trained", f"{total_parameters:,}", f"{trainable_parameters:,}")


class RunProgress(ProgressBar):
    """A bar over all steps of a run on a terminal; elsewhere a line whenever the trainer logs.

    Lightning's bars start anew in every epoch, and a run that is limited by steps has no last epoch. The remaining
    time is that of all remaining steps at the mean rate since this start, including validations and checkpoints.

    Args:
        shown: Whether standard error is a terminal. Defaults to asking it.
    """

    def __init__(self, shown: bool | None = None) -> None:
        super().__init__()
        self.shown = (sys.stderr is not None and sys.stderr.isatty()) if shown is None else shown
        self._enabled = True
        self._bar: tqdm[Any] | None = None
        self._total: int | None = None
        self._first = self._last = 0
        self._began = 0.0

    def disable(self) -> None:
        """Hides it; Lightning calls this in all processes but one."""
        self._enabled = False

    def enable(self) -> None:
        """Shows it."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar."""
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Loss of the latest step, and what is logged for progress bars."""
        loss = trainer.callback_metrics.get(LOSS)
        shown = {} if loss is None else {LOSS: float(loss)}
        return {**shown, **super().get_metrics(trainer, pl_module)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts at the step of the checkpoint."""
        self._total, self._first, self._last = total_steps(trainer), trainer.global_step, trainer.global_step
        self._began = time.monotonic()
        if self._enabled and self.shown:
            self._bar = tqdm(total=self._total, initial=self._first, unit="step", smoothing=0, dynamic_ncols=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts optimizer steps."""
        step = trainer.global_step
        if not self._enabled or step == self._last:
            return
        if self._bar is not None:
            if self._bar.update(step - self._last):  # it was due for a refresh
                self._bar.set_postfix_str(_metrics(self.get_metrics(trainer, pl_module)), refresh=False)
        elif self._is_due(trainer, step):
            log.warning("%s", self._line(step, _metrics(self.get_metrics(trainer, pl_module))))
        self._last = step

    def _is_due(self, trainer: Trainer, step: int) -> bool:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return step == self._total or (bool(every) and step % every == 0)

    def _line(self, step: int, metrics: str) -> str:
        rate = (step - self._first) / max(time.monotonic() - self._began, 1e-9)
        parts = [f"step {step:,}" + (f" of {self._total:,}" if self._total else "")]
        if self._total:
            parts.append(f"{timedelta(seconds=math.ceil((self._total - step) / rate))} left")
        parts.append(f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s/step")
        return ", ".join([*parts, metrics] if metrics else parts)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says that the steps wait for a validation."""
        if self._bar is not None:
            self._bar.set_description_str("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the word."""
        if self._bar is not None:
            self._bar.set_description_str("")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that messages follow below it."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def total_steps(trainer: Trainer) -> int | None:
    """Returns the optimizer steps after which a run ends, whichever limit comes first; None without a limit."""
    total = trainer.estimated_stepping_batches
    return int(total) if math.isfinite(total) and total > 0 else None


def _metrics(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
        if name != "v_num"
    )


def quieter(callback: Callback, fits: bool = True) -> Callback:
    """Returns this module's replacement of Lightning's summary or progress bar, or the callback itself.

    Args:
        callback: A callback that the recipe did not choose.
        fits: Whether the trainer trains; other commands keep Lightning's bar. Defaults to True.
    """
    if isinstance(callback, ModelSummary):
        return ParameterCount()
    return RunProgress() if fits and type(callback) in (RichProgressBar, TQDMProgressBar) else callback
