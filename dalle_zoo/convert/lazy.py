"""Tensors that are computed when they are read, and networks that are written from them shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.weights import Lazy, misfit, save_weights

CONVERTED_SHARD_BYTES = 10**9
"""Weights larger than this are split into shards, of which one is in memory at a time."""


@dataclass(frozen=True, eq=False)
class DerivedTensor:
    """A tensor that is computed when it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def read(self) -> Tensor:
        """Returns the tensor, on the CPU."""
        return self.make()


def concatenated(parts: Sequence[Lazy], dim: int = 0) -> DerivedTensor:
    """Concatenates tensors, such as the matrices of queries, keys and values.

    Args:
        parts: Tensors of the same dtype and, except along `dim`, the same shape.
        dim: Dimension to concatenate along. Defaults to the first.

    Raises:
        WeightFileError: Shapes or dtypes differ.
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


def filled(shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> DerivedTensor:
    """Returns a constant tensor, for weights that a file leaves out."""
    return DerivedTensor(shape, dtype, lambda: torch.full(shape, value, dtype=dtype))


def in_float32(tensor: Lazy) -> Lazy:
    """Converts a floating-point tensor to float32; `write_network` refuses other dtypes."""
    if not tensor.dtype.is_floating_point:
        return tensor
    return DerivedTensor(tuple(tensor.shape), torch.float32, lambda: tensor.read().float())


def write_network(
    folder: Path, kind: str, net: nn.Module, tensors: Mapping[str, Lazy], shard_bytes: int = CONVERTED_SHARD_BYTES
) -> None:
    """Writes a native network from lazy tensors, one shard at a time; tensors keep their dtype.

    Args:
        folder: New folder to write.
        kind: Name of the network in its registry.
        net: The network on the meta device, which gives the names and shapes of the tensors.
        tensors: Weights under native names.
        shard_bytes: As in `dalle_zoo.weights.save_weights`. Defaults to 1 GB.

    Raises:
        WeightFileError: Tensors are missing, unexpected, of another shape, not floating point, or not finite.
    """
    check_fit(tensors, net.state_dict())
    folder.mkdir()
    config: Any = net.config
    checked = {name: _finite(name, tensor) for name, tensor in tensors.items()}
    save_weights(checked, {"type": kind, **asdict(config)}, folder, shard_bytes=shard_bytes)


def check_fit(tensors: Mapping[str, Lazy], expected: Mapping[str, Tensor]) -> None:
    """Raises `WeightFileError` unless the tensors have the expected names and shapes and are floating point.

    Args:
        tensors: Weights under native names.
        expected: State dict of the network; may be on the meta device.
    """

    def mismatches(name: str) -> Iterator[str]:
        stored = tensors[name]
        if stored.shape != tuple(expected[name].shape):
            yield f"{name} has shape {stored.shape}, expected {tuple(expected[name].shape)}"
        elif not stored.dtype.is_floating_point:
            yield f"{name} is {stored.dtype}, expected floating point"

    if problems := misfit(expected.keys(), tensors.keys(), mismatches):
        raise WeightFileError(f"the weights do not fit: {problems}")


def _finite(name: str, tensor: Lazy) -> DerivedTensor:
    """Checks values when they are read; float64 becomes float32."""
    dtype = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype

    def read() -> Tensor:
        value = tensor.read().to(dtype)
        if not value.isfinite().all():
            raise WeightFileError(f"{name} has values that are not finite in {dtype}: the weights are damaged")
        return value

    return DerivedTensor(tuple(tensor.shape), dtype, read)
