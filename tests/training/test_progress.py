"""What a run prints while it trains."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar, TQDMProgressBar

from dalle_zoo.training import progress
from dalle_zoo.training.progress import ParameterCount, RunProgress, quieter, total_steps


def stand_in(total: float = 100, step: int = 40, every: int = 20, **metrics: float) -> Any:
    """Attributes of a trainer that the callback reads."""
    return SimpleNamespace(
        estimated_stepping_batches=total, global_step=step, log_every_n_steps=every,
        callback_metrics=metrics, progress_bar_metrics={}, loggers=[],
    )  # fmt: skip


def advance(bar: RunProgress, trainer: Any, steps: int) -> None:
    for _ in range(steps):
        trainer.global_step += 1
        bar.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]


def test_lines_name_total_and_remaining_time_of_the_run(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([1000.0, 1010.0, 1030.0, 1060.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    bar, trainer = RunProgress(shown=False), stand_in(**{"train/loss": 2.5})
    bar.on_train_start(trainer, None)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        advance(bar, trainer, 60)
        bar.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]  # half of an accumulated step
    # Resumed at step 40; 20 steps took 10 s at first, so the other 40 take 20 s.
    assert [record.getMessage() for record in caplog.records] == [
        "step 60 of 100, 0:00:20 left, 2 steps/s, train/loss 2.5",
        "step 80 of 100, 0:00:15 left, 1.33 steps/s, train/loss 2.5",
        "step 100 of 100, 0:00:00 left, 1 steps/s, train/loss 2.5",
    ]


def test_bar_counts_all_steps_and_starts_at_the_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    bar, trainer = RunProgress(shown=True), stand_in(total=50)
    bar.on_train_start(trainer, None)  # type: ignore[arg-type]
    bar.on_validation_start(trainer, None)  # type: ignore[arg-type]
    bar.on_validation_end(trainer, None)  # type: ignore[arg-type]
    advance(bar, trainer, 10)
    bar.on_train_end(trainer, None)  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert "40/50" in said
    assert "50/50" in said
    assert "validation" in said
    assert "Epoch" not in said


def test_other_processes_and_unlimited_runs(caplog: pytest.LogCaptureFixture) -> None:
    hidden, endless = RunProgress(shown=False), RunProgress(shown=False)
    hidden.disable()
    for bar in (hidden, endless):
        trainer = stand_in(total=math.inf, step=0)
        bar.on_train_start(trainer, None)  # type: ignore[arg-type]
        advance(bar, trainer, 20)
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == ["step 20"]
    assert total_steps(stand_in(total=-1)) is None


def test_bars_and_summaries_of_lightning_are_replaced() -> None:
    for bar in (RichProgressBar(), TQDMProgressBar()):
        assert isinstance(quieter(bar), RunProgress)
        assert quieter(bar, fits=False) is bar
    assert isinstance(quieter(ModelSummary()), ParameterCount)
