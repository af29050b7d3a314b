"""Sharding with torch's ``fully_shard`` (FSDP2): ``fsdp2`` over all processes, ``hsdp`` in groups of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from dalle_zoo.models.residual import shard_axis
from dalle_zoo.training.precision import MIXED
from dalle_zoo.training.strategies.states import ShardedStates

REPLICATE, SHARD = "replicate", "shard"


class FullyShard(ShardedStates, ModelParallelStrategy):
    """Shards weights, gradients and moments over processes; a residual block is gathered while it is in use.

    Matrices are sharded along their outputs, except the second matrix of an MLP, which is sharded along its inputs,
    as in the paper (table 2).

    Args:
        shard_size: Number of processes that share a copy of the network; gradients are averaged over the copies. 0
            means the processes of one machine. Defaults to all processes.

    Example:
        >>> from dalle_zoo.training.strategies import make_strategy
        >>> make_strategy("hsdp(shard_size=4)").shard_size, FullyShard.defers_weights
        (4, True)
    """

    defers_weights = True
    precision_kind = "fsdp2"

    def __init__(self, shard_size: int | None = None) -> None:
        super().__init__()
        if shard_size is not None and shard_size < 0:
            raise ValueError(f"shard_size must be at least 0 (the processes of one machine), got {shard_size}")
        self.shard_size = shard_size
        self._mesh: DeviceMesh | None = None

    @property
    def mesh(self) -> DeviceMesh:
        """Mesh of the processes, (copies, shards)."""
        assert self._mesh is not None, "processes have not been set up"
        return self._mesh

    def setup_environment(self) -> None:
        """Connects the processes and builds their mesh."""
        world = self.num_nodes * self.num_processes
        # Lightning's own mesh is for its samplers: every process has its own data.
        self._data_parallel_size, self._tensor_parallel_size = world, 1
        super().setup_environment()
        size = {None: world, 0: self.num_processes}.get(self.shard_size, self.shard_size) or world
        if world % size:
            raise ValueError(
                f"shard_size {size} does not divide the {world} processes ({self.num_nodes} x {self.num_processes}): "
                "choose a divisor"
            )
        self._mesh = init_device_mesh(self.root_device.type, (world // size, size), mesh_dim_names=(REPLICATE, SHARD))

    @property
    def sharding_mesh(self) -> DeviceMesh:
        """Mesh for ``fully_shard``, which averages gradients over copies itself."""
        return self.mesh if self.mesh[REPLICATE].size() > 1 else self.mesh[SHARD]

    def shard(self, net: nn.Module, units: Sequence[nn.Module], entries: Sequence[str]) -> None:
        """Shards a network in place, and initializes it if it has no weights yet.

        Args:
            net: Network; parameters outside the units form the root unit, in float32.
            units: Modules that are gathered one at a time, in the order of their use.
            entries: Methods of the network that training calls.
        """
        # Some linear layers return views, which nothing writes into.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        policy = unit_policy(self.precision_plugin)
        options: dict[str, Any] = {
            "mesh": self.sharding_mesh,
            "shard_placement_fn": _axis(net, self.mesh[SHARD].size()),
        }
        for unit in units:
            fully_shard(unit, mp_policy=policy, **options)
        fully_shard(net, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
        for entry in entries:
            register_fsdp_forward_method(net, entry)
        if any(parameter.is_meta for parameter in net.parameters()):
            net.to_empty(device=self.root_device)
            net.reset_parameters(self.broadcast(net.seed))  # type: ignore[operator]

    def release(self, module: nn.Module) -> None:
        """Frees gathered units: without a backward pass, the root unit stays gathered after a forward pass."""
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def unit_policy(precision: Precision) -> MixedPrecisionPolicy:
    """Returns the precision in which weights of a unit are gathered; gradients are reduced in float32."""
    own: MixedPrecisionPolicy | None = getattr(precision, "unit_policy", None)
    if own is not None:
        return own
    gathered = MIXED.get(str(precision.precision))
    return MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _axis(net: nn.Module, shards: int) -> Any:
    """Axis along which ``fully_shard`` divides a parameter."""
    second = {p for name, p in net.named_parameters() if shard_axis(name, p.shape, shards) == 1}

    def axis(parameter: nn.Parameter) -> Shard:
        return Shard(1 if parameter in second else 0)

    return axis
