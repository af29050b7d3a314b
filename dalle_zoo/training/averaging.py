"""Exponential moving average of the weights, sharded like them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dalle_zoo.models.initial import local, shard_like
from dalle_zoo.training.strategy_hooks import hooks_of

log = logging.getLogger(__name__)

DOMINATES = 0.1
"""Share of the first weights in the average above which a run warns when it ends."""
STATE = "average"
"""Key of the averaged weights in a checkpoint, by the names of the weights."""


class WeightEMA(Callback):
    """Averages the weights during training; validation, images and the exported model use the average.

    Every ``every`` steps, ``average = d * average + (1 - d) * weights``; the first average is a copy of the weights.
    In update t, ``d = min(decay, (1 + t) / (10 + t))``, so that the average of a short run forgets its beginning. The
    average is float32, since 16 bits would round small changes away. Each process averages its own shard. Lightning's
    averaging copies the module before it is sharded, so it cannot be used here.

    Reference: the dVAE's decay is 0.999 at every step (appendix A.2); the prior's is 0.99 every 25 steps, on the CPU
    (appendix B.2).

    Args:
        decay: Weight of the old average in each update.
        every: Optimizer steps between updates of the average.
        start: Optimizer steps before the first average, for runs that begin with another objective.
        device: Device of the average. Defaults to the device of the weights.
    """

    def __init__(self, decay: float = 0.999, every: int = 1, start: int = 0, device: str | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        if start < 0:
            raise ValueError(f"start must be at least 0 steps, got {start}")
        self.decay, self.every, self.start, self.device = decay, every, start, device
        self.average: list[Tensor] | None = None
        """This process's shard of the averaged weights, in the order of the parameters; None at first."""
        self._averaged_at = 0

    def decay_at(self, step: int) -> float:
        """Weight of the old average in its t-th update."""
        return min(self.decay, (1 + step) / (10 + step))

    def share_of_start(self, step: int) -> float:
        """Returns the share of the first averaged weights in the average after a number of steps; initially 1."""
        share = 1.0
        for update in range(self.start // self.every + 2, step // self.every + 1):
            share *= self.decay_at((update * self.every - self.start) // self.every)
            if share < DOMINATES / 10:
                break
        return share

    def adopt(self, module: LightningModule) -> None:
        """Sets the average to the module's weights."""
        self.average = [weight.to(self.device, torch.float32, copy=True) for weight in held(module)]

    @torch.no_grad()
    def copy_to(self, module: LightningModule) -> None:
        """Copies the averaged weights, if there are any, to the module."""
        for weight, average in zip(held(module), self.average or [], strict=self.average is not None):
            weight.copy_(average)

    @contextmanager
    def applied(self, module: LightningModule) -> Iterator[None]:
        """Replaces the module's weights by the average inside the context, and restores them afterwards.

        The module's own weights are saved on the device of the average, so an average on the CPU needs no GPU memory.
        """
        own: list[Tensor] = []
        if self.average is not None:
            own = [
                weight.to(average.device, copy=True)
                for weight, average in zip(held(module), self.average, strict=True)
            ]
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(held(module), own, strict=bool(own)):
                    weight.copy_(value)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the average after an optimizer step, if it is due."""
        step = trainer.global_step
        if step in (0, self._averaged_at) or step <= self.start or step % self.every:
            return
        self._averaged_at = step
        if self.average is None:
            self.adopt(pl_module)
            return
        decay = self.decay_at((step - self.start) // self.every)
        for average, weight in zip(self.average, held(pl_module), strict=True):
            average.lerp_(weight.to(average.device, torch.float32), 1 - decay)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the average the weights of the trained model; warns if the first weights dominate it."""
        self.copy_to(pl_module)
        share = self.share_of_start(trainer.global_step)
        if self.average is not None and share > DOMINATES and trainer.is_global_zero:
            log.warning(
                "the averaged weights, which are exported, still consist to %.0f %% of the first ones: train for more "
                "steps, or set a lower decay or every of WeightEMA",
                100 * share,
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validates with the averaged weights."""
        self._validation = self.applied(pl_module)
        self._validation.__enter__()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continues training with the weights themselves."""
        self._validation.__exit__(None, None, None)

    # ------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Step of the last update; the average itself is saved like the weights."""
        return {"averaged_at": self._averaged_at}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._averaged_at = state_dict["averaged_at"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the averaged weights, sharded like the weights."""
        if self.average is None:
            return
        if hooks_of(trainer.strategy).flat:
            with self.applied(pl_module):
                state = trainer.strategy.lightning_module_state_dict()
                checkpoint[STATE] = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
            return
        trained = [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad]
        checkpoint[STATE] = {
            name: shard_like(average, parameter).to("cpu", copy=True)
            for (name, parameter), average in zip(trained, self.average, strict=True)
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Loads the average from an unsharded checkpoint; a sharded strategy has loaded its own already."""
        average = checkpoint.pop(STATE, None)
        if average is None:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            self.fill(pl_module, lambda tensors: [tensor.copy_(average[name]) for name, tensor in tensors.items()])
        else:
            pl_module.load_state_dict({**pl_module.state_dict(), **average})

    @torch.no_grad()
    def fill(self, module: LightningModule, load: Callable[[dict[str, Tensor]], Any]) -> None:
        """Sets the average to what ``load`` writes into float32 tensors with the names and shards of the weights."""
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        tensors = {name: torch.zeros_like(p.detach(), dtype=torch.float32) for name, p in trained.items()}
        load(tensors)
        self.average = [local(tensor).to(self.device) for tensor in tensors.values()]


def held(module: LightningModule) -> list[Tensor]:
    """Returns this process's shards of the module's trained parameters, which share their memory."""
    hooks_of(module.trainer.strategy).release(module)
    return [local(parameter.detach()) for parameter in module.parameters() if parameter.requires_grad]
