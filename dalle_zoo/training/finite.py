"""Ends a run before numbers that are not finite reach its weights or its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from dalle_zoo.models.initial import local
from dalle_zoo.training.precision import ResblockPrecision

MAX_SKIPPED = 100
"""Steps with a loss that is not finite which a float16 precision may skip in a row: no gradient scale can mend it."""


class NonFiniteError(ValueError):
    """A loss, a gradient or a weight is infinite or not a number."""


class FiniteGuard(Callback):
    """Stops at the first step whose loss or gradients are not finite, before the step changes the weights.

    Precisions that scale gradients skip such steps by design, until `max_skipped` of them follow each other.
    """

    def __init__(self) -> None:
        self.skipped = 0
        """Steps skipped so far by Lightning's float16; `ResblockPrecision` counts its own."""
        self._in_a_row = 0
        self._losses: list[Tensor] = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Records the loss of a batch, without waiting for the device."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Checks the losses and the gradients of a step; all processes decide alike.

        Raises:
            NonFiniteError: The step would make the weights useless.
        """
        losses, self._losses = torch.stack(self._losses), []
        gradients = [local(p.grad) for p in pl_module.parameters() if p.grad is not None]
        finite = losses.isfinite().all() & largest(gradients).to(losses.device).isfinite()
        if agreed(trainer, finite):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        allowed = max_skipped(trainer.precision_plugin, bool(losses.isfinite().all()))
        if self._in_a_row <= allowed:
            if not isinstance(trainer.precision_plugin, ResblockPrecision):
                self.skipped += 1
                pl_module.log("train/skipped_steps", float(self.skipped))
            return
        where = f"step {trainer.global_step + 1}"
        if allowed:
            where += f", the last of {self._in_a_row} that were skipped one after the other"
        raise NonFiniteError(
            f"training stops in {where}: {_what(losses, pl_module)}. The weights and the checkpoints are those of "
            "the steps before. Resume with a lower model.learning_rate.peak in a new run, with "
            "trainer.gradient_clip_val, or with data that have no extreme values"
        )

    def state_dict(self) -> dict[str, Any]:
        """Number of skipped steps."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.skipped = state_dict["skipped"]


def largest(tensors: Iterable[Tensor]) -> Tensor:
    """Returns the largest absolute value, a scalar: infinite or NaN if any value is, 0 without tensors."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    return get_total_norm(filled, math.inf).float() if filled else torch.zeros(())


def agreed(trainer: Trainer, value: Tensor) -> bool:
    """Returns whether a bool () is true in all processes."""
    if trainer.world_size == 1 or not dist.is_initialized():
        return bool(value)
    flag = value.to(trainer.strategy.root_device, torch.int32)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def max_skipped(precision: object, finite_loss: bool) -> int:
    """Returns how many steps a precision may skip in a row; 0 if it does not skip.

    Args:
        precision: Plugin of the precision.
        finite_loss: Whether only gradients are not finite, which a smaller scale may mend.
    """
    if isinstance(precision, ResblockPrecision):
        config = precision.config
        divisions = math.log(config.largest / config.smallest) / -math.log(config.backoff)
        return round(divisions) * config.cooldown if finite_loss else MAX_SKIPPED
    return MAX_SKIPPED if getattr(precision, "scaler", None) is not None else 0


def check_weights(module: LightningModule, what: str) -> None:
    """Raises `NonFiniteError` unless all parameters of this process are finite.

    Args:
        module: The module.
        what: What is about to happen with them, for the message.
    """
    name = first_not_finite(module)
    if name is not None:
        raise NonFiniteError(f"{what}: the weights {name!r} are not finite")


@torch.no_grad()
def first_not_finite(module: LightningModule) -> str | None:
    """Returns the name of the first parameter with a value that is not finite."""
    parts = [(name, local(parameter.detach())) for name, parameter in module.named_parameters()]
    if largest(part for _, part in parts).isfinite():
        return None
    return next(name for name, part in parts if not largest([part]).isfinite())


def _what(losses: Tensor, module: LightningModule) -> str:
    wrong = [float(loss) for loss in losses if not loss.isfinite()]
    if wrong:
        return f"the loss is {wrong[0]}"
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not largest([local(parameter.grad)]).isfinite():
            return f"the gradient of {name!r} is not finite"
    return "another process has a loss or a gradient that is not finite"
