"""Sharding with torch's ``FullyShardedDataParallel`` (FSDP1), also on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.optim import Optimizer

from dalle_zoo.training.strategies.states import ShardedStates


class FSDP1(ShardedStates, FSDPStrategy):
    """Shards weights, gradients and moments over all processes, as one flat vector per residual block.

    Lightning's own class supports CUDA only.

    Example:
        >>> from dalle_zoo.training.strategies import make_strategy
        >>> type(make_strategy("fsdp")).__name__, FSDP1.flat
        ('FSDP1', True)
    """

    flat = True
    compiles = False
    precision_kind = "fsdp"

    def __init__(self) -> None:
        super().__init__(sharding_strategy="FULL_SHARD", use_orig_params=True)
        self._units: Sequence[nn.Module] = ()

    def shard(self, net: nn.Module, units: Sequence[nn.Module], entries: Sequence[str]) -> None:
        """Records the units; Lightning wraps the LightningModule later, so ``entries`` are not needed."""
        del entries
        if any(parameter.is_meta for parameter in net.parameters()):
            raise ValueError("fsdp needs a network with weights: build it without `deferred_weights`, or use fsdp2")
        self._units = units

    def _setup_model(self, model: nn.Module) -> FullyShardedDataParallel:
        units, precision = set(self._units), getattr(self.precision_plugin, "unit_config", None)

        def wrap(module: nn.Module) -> bool | dict[str, Any]:
            return {"mixed_precision": precision} if module in units else False

        return FullyShardedDataParallel(
            model,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            auto_wrap_policy=CustomPolicy(wrap),
            # With a mesh, shards are DTensors, like those of fully_shard.
            device_mesh=init_device_mesh(self.root_device.type, (self.world_size,)),
            device_id=self.root_device,
            use_orig_params=True,
        )

    def clip(self, module: LightningModule, optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
        """Clips the norm of the gradients over all shards."""
        del module, optimizer
        if value is None:
            return
        if algorithm not in (None, "norm"):
            raise ValueError(f"fsdp clips by norm only, got gradient_clip_algorithm={algorithm!r}: use fsdp2")
        assert isinstance(self.model, FullyShardedDataParallel)
        self.model.clip_grad_norm_(value)

    def gradient_norm(self, module: nn.Module) -> Tensor:
        """Returns the norm of the gradients over all shards, which are parts of flat vectors."""
        squares = super().gradient_norm(module).float().square().to(self.root_device)
        torch.distributed.all_reduce(squares)
        return squares.sqrt()

    def release(self, module: nn.Module) -> None:
        """Frees the root unit: without a backward pass, its weights stay gathered after a forward pass."""
        del module
        handle = self.model._handle if isinstance(self.model, FullyShardedDataParallel) else None  # has no method
        if handle is not None and not handle.needs_unshard():
            handle.reshard(free_unsharded_flat_param=True)
