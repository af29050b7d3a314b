"""Initial weights as a function of (seed, name), and helpers for tensors that are sharded over processes.

A process with one shard of a parameter samples the same numbers as a process with the complete parameter. Numbers are
sampled on the CPU, whose generator gives the same numbers everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:  # importing it takes most of a second, and only sharded runs need it
    from torch.distributed.tensor import DTensor


class _NoRandomInit(TorchFunctionMode):
    """Skips `torch.nn.init`, which has no effect without storage but imports PyTorch's compiler."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else None
        return function(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Builds networks on the meta device: their parameters have shapes, but no storage and no values."""
    with torch.device("meta"), _NoRandomInit():
        yield


def fresh_seed() -> int:
    """Samples a seed from the global generator, even if the default device is meta."""
    return int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))


@torch.no_grad()
def fill(parameter: Tensor, mean: float, std: float, seed: int, name: str) -> None:
    """Fills a complete or sharded parameter with normally distributed numbers, or with the mean if ``std`` is 0."""
    if std == 0:
        parameter.fill_(mean)
        return
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    copy_shard(parameter, torch.empty(parameter.shape).normal_(mean, std, generator=generator))


@torch.no_grad()
def copy_shard(parameter: Tensor, unsharded: Tensor) -> None:
    """Copies a tensor into a parameter: all of it, or the shard of this process if the parameter is sharded."""
    if not _is_sharded(parameter):
        parameter.copy_(unsharded)
        return
    from torch.distributed.tensor import Shard

    mesh = parameter.device_mesh
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            parts = unsharded.chunk(mesh.size(dimension), placement.dim)
            rank = mesh.get_local_rank(dimension)
            unsharded = parts[rank] if rank < len(parts) else unsharded.narrow(placement.dim, 0, 0)
    local(parameter).copy_(unsharded)


def local(tensor: Tensor) -> Tensor:
    """Returns the shard of this process, or the tensor if it is not sharded; memory is shared."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def shard_like(part: Tensor, parameter: Tensor) -> Tensor:
    """Wraps this process's part of a tensor as a tensor sharded like the parameter, on the parameter's device."""
    part = part.to(local(parameter.detach()).device)
    if not _is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def _is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "to_local")
