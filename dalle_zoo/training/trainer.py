"""Lightning's Trainer, with the strategies and precisions of dalle-zoo by name."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator, CUDAAccelerator
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo.specs import parse_spec
from dalle_zoo.training.precision import PRECISIONS, make_precision
from dalle_zoo.training.strategies import EXAMPLE, STRATEGIES, make_strategy
from dalle_zoo.training.strategy_hooks import hooks_of

ALIASES = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Short names of Lightning."""
OF_LIGHTNING = ("16-true", "64", "64-true", "transformer-engine", "transformer-engine-float16")
"""Precisions that are passed to Lightning."""


class ZooTrainer(Trainer):
    """Lightning's Trainer, which also accepts ``hsdp_powersgd(rank=896)`` and ``16-resblock``.

    Args:
        strategy: A name in `strategies.STRATEGIES`, with options in parentheses, or a strategy of Lightning.
        precision: "32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-resblock", or a precision of Lightning.
        accelerator: As in Lightning.
        plugins: As in Lightning. The plugin of a precision is added to them.
        kwargs: Other arguments of Lightning's Trainer.
    """

    def __init__(
        self,
        *,
        strategy: str | Strategy = "auto",
        precision: str | int | None = None,
        accelerator: str | Accelerator = "auto",
        plugins: Any = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(strategy, str):
            name = parse_spec(strategy, "strategy", EXAMPLE)[0]
            if name in STRATEGIES:
                strategy = make_strategy(strategy)
            elif name not in ("auto", *StrategyRegistry.available_strategies()):
                raise UnknownNameError(suggest("strategy", name, ["auto", *STRATEGIES]))
        precision = ALIASES.get(str(precision), precision)
        if precision in PRECISIONS:
            hooks = hooks_of(strategy)
            hooks.check_precision(str(precision))
            plugin = make_precision(str(precision), _device_type(accelerator), hooks.precision_kind)
            plugins, precision = [*_listed(plugins), plugin], None
        elif isinstance(precision, str) and precision not in OF_LIGHTNING:
            raise UnknownNameError(suggest("precision", precision, PRECISIONS))
        super().__init__(
            strategy=strategy,
            precision=precision,  # type: ignore[arg-type]
            accelerator=accelerator,
            plugins=plugins,
            **kwargs,
        )


def _device_type(accelerator: str | Accelerator) -> str:
    on_gpu = accelerator in ("auto", "gpu", "cuda") or isinstance(accelerator, CUDAAccelerator)
    return "cuda" if on_gpu and torch.cuda.is_available() else "cpu"


def _listed(plugins: Any) -> list[Any]:
    if plugins is None:
        return []
    return list(plugins) if isinstance(plugins, list | tuple) else [plugins]
