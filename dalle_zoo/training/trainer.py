"""Lightning's Trainer, with our strategies and precisions by name."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy

from dalle_zoo.specs import parse_spec
from dalle_zoo.training.strategies import STRATEGIES, make_strategy


class ZooTrainer(Trainer):
    """A Trainer that knows ``hsdp_powersgd(rank=896)`` and ``16-resblock``.

    Args:
        strategy: A name in `strategies.STRATEGIES`, with options in parentheses; else what Lightning takes.
        precision: "32-true", "bf16-mixed", "bf16-true", "16-mixed" or "16-resblock"; else what Lightning takes.
        kwargs: All else that Lightning's Trainer takes.
    """

    def __init__(
        self, *, strategy: str | Strategy = "auto", precision: str | int | None = None, **kwargs: Any
    ) -> None:
        if isinstance(strategy, str) and parse_spec(strategy, "strategy", "hsdp_powersgd(rank=896)")[0] in STRATEGIES:
            strategy = make_strategy(strategy)
        super().__init__(strategy=strategy, precision=precision, **kwargs)  # type: ignore[arg-type]
