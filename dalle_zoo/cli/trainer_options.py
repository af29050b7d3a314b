"""Options of Lightning's trainer that a run cannot honor, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dalle_zoo.cli.errors import UserError

REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "enable_checkpointing": (
        (None, True),
        "a run always writes checkpoints; set checkpoint.every to a large number to write the last one only",
    ),
    "reload_dataloaders_every_n_epochs": (
        (0,),
        "the loader gives every epoch its own order and crops already, and a reloaded one would repeat epoch 0",
    ),
    "fast_dev_run": (
        (False, 0),
        "it trains without checkpoints and curves, but its weights would be exported; use --trainer.max_steps 2 "
        "--run FOLDER",
    ),
    "barebones": (
        (False,),
        "it turns off checkpoints, curves and validation; use --trainer.enable_progress_bar false",
    ),
    "enable_autolog_hparams": ((True,), "config.yaml in the run folder has all settings"),
    "model_registry": ((None,), "checkpoints are in the run folder; use dalle-zoo publish for finished models"),
}
"""Name of an option to the values that change nothing, and why the others are refused."""


def check_trainer(trainer: Any) -> None:
    """Raises `UserError` for options of the trainer that contradict the layout or the resuming of a run.

    Args:
        trainer: Settings of the recipe, with an attribute per option.
    """
    for name, (harmless, reason) in REFUSED.items():
        value = getattr(trainer, name, harmless[0])
        if value not in harmless:
            raise UserError(f"trainer.{name} cannot be {value!r}: {reason}")
