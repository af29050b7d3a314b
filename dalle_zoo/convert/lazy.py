"""Tensors made of stored ones when they are read, and a network written from them without all of it in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_zoo.convert.base import check_fit
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.weights import Lazy, save_weights

CONVERTED_SHARD_BYTES = 10**9
"""Weights above this size are written to several files: what is in memory while a network is written."""


@dataclass(frozen=True, eq=False)
class DerivedTensor:
    """A tensor that is made when it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        return self.make()


def concatenated(parts: Sequence[Lazy], dim: int = 0) -> DerivedTensor:
    """Several one after the other along a dimension, such as the matrices of queries, keys and values.

    Raises:
        WeightFileError: Their other dimensions or their precisions differ.
    """
    first = parts[0]
    for part in parts:
        others = [shape[:dim] + shape[dim + 1 :] for shape in (first.shape, part.shape)]
        if len(part.shape) <= dim or others[0] != others[1] or part.dtype != first.dtype:
            raise WeightFileError(
                f"tensors that belong together have shapes {first.shape} and {part.shape}, "
                f"{first.dtype} and {part.dtype}"
            )
    shape = (*first.shape[:dim], sum(part.shape[dim] for part in parts), *first.shape[dim + 1 :])
    return DerivedTensor(shape, first.dtype, lambda: torch.cat([part.read() for part in parts], dim))


def transposed(part: Lazy) -> DerivedTensor:
    """A matrix with rows and columns exchanged."""
    return DerivedTensor(part.shape[::-1], part.dtype, lambda: part.read().T.contiguous())


def filled(shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> DerivedTensor:
    """A tensor of one number, for what a file leaves out."""
    return DerivedTensor(shape, dtype, lambda: torch.full(shape, value, dtype=dtype))


def write_network(
    folder: Path, kind: str, net: nn.Module, tensors: Mapping[str, Lazy], shard_bytes: int = CONVERTED_SHARD_BYTES
) -> None:
    """Writes a native network from lazy tensors, a shard after the other, each in the precision that it has.

    Args:
        folder: Where to; is made.
        kind: Name of the network in its registry.
        net: The network on the meta device, whose names and shapes the tensors must have.
        tensors: Weights under our names.
        shard_bytes: As for `dalle_zoo.weights.save_weights`.

    Raises:
        WeightFileError: Tensors are missing, left over, of another shape, not floating point, or not finite.
    """
    check_fit(tensors, net.state_dict())
    folder.mkdir()
    config: Any = net.config
    checked = {name: _finite(name, tensor) for name, tensor in tensors.items()}
    save_weights(checked, {"type": kind, **asdict(config)}, folder, shard_bytes=shard_bytes)


def _finite(name: str, tensor: Lazy) -> DerivedTensor:
    dtype = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype

    def read() -> Tensor:
        value = tensor.read().to(dtype)
        if not value.isfinite().all():
            raise WeightFileError(f"{name} holds values that are not finite in {dtype}: the weights are damaged")
        return value

    return DerivedTensor(tuple(tensor.shape), dtype, read)
