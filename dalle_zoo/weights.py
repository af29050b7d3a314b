"""Reads and writes the tensors of a network as safetensors, in one file or in shards with an index.

Pickles are never read. Loading needs little more memory than the weights: a network is built without storage (on the
meta device), and each tensor is read separately and moved directly to the requested device and dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from threading import get_ident
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dalle_zoo.files import atomic_write, read_json, write_json
from dalle_zoo.model_folder import CONFIG, NETWORK_FILES, WEIGHTS, ModelFolderError, substitute_hint
from dalle_zoo.models.initial import copy_shard, shapes_only

Net = TypeVar("Net", bound=nn.Module)

SHARD_BYTES = 5 * 10**9
"""Weights larger than this are split into shards."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Floating-point dtypes accepted in safetensors files, under their names there. Any can be loaded as any other."""
MAPPED_BYTES = 64 << 20
"""Tensors are read from one opening of a file until they exceed this size: opening it for each one takes longer than
reading a small tensor."""
INTEGERS = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
"""Other dtypes and their names in safetensors files. They must match exactly."""


MAX_NAME = 255
"""Limit of a file name in characters; file systems refuse longer ones."""


class Lazy(Protocol):
    """A tensor that is read only when it is needed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""

    def read(self) -> Tensor:
        """Reads the tensor into memory, on the CPU."""


# ---------------------------------------------------------------- saving


def save_weights(
    tensors: Mapping[str, Tensor | Lazy],
    config: Mapping[str, Any],
    folder: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes weights and ``config.json`` to an existing folder.

    Args:
        tensors: Weights by name. Lazy tensors are read one shard at a time.
        config: Contents of ``config.json``.
        folder: The destination. Older weight files that are not overwritten are removed at the end.
        dtype: Dtype to store floating-point weights in. Defaults to the dtype of each tensor.
        shard_bytes: Maximum size of a weight file. Larger weights are split into
            ``model-00001-of-0000n.safetensors`` and so on, with ``model.safetensors.index.json``. A tensor is never
            split. Defaults to 5 GB.
    """
    target_dtypes = {
        n: dtype if dtype is not None and t.dtype.is_floating_point else t.dtype for n, t in tensors.items()
    }
    sizes = {n: math.prod(t.shape) * target_dtypes[n].itemsize for n, t in tensors.items()}
    shards = _assign_shards(sizes, shard_bytes)
    files = [WEIGHTS] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        stored = {n: _in_memory(tensors[n]).to("cpu", target_dtypes[n]).contiguous() for n in names}
        with atomic_write(folder / file) as temporary:
            save_file(stored, temporary, metadata={"format": "pt"})
        del stored
    if len(shards) > 1:
        where = {n: file for file, names in zip(files, shards, strict=True) for n in names}
        index = index_path(folder / WEIGHTS)
        write_json(index, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
        files.append(index.name)
    for old in folder.iterdir():
        if old.name not in (*files, CONFIG) and any(fnmatchcase(old.name, own) for own in NETWORK_FILES):
            old.unlink()
    write_json(folder / CONFIG, dict(config))


def _in_memory(tensor: Tensor | Lazy) -> Tensor:
    return tensor.detach() if isinstance(tensor, Tensor) else tensor.read()


def _assign_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Groups names, in order, so that each group has at most ``limit`` bytes or one tensor; at least one group."""
    if limit < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {limit}")
    groups: list[list[str]] = [[]]
    available = limit
    for name, size in sizes.items():
        if size > available and groups[-1]:
            groups.append([])
            available = limit
        groups[-1].append(name)
        available -= size
    return groups


def _shard_name(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def index_path(path: Path) -> Path:
    """Returns the path of the index that maps tensors to shards, for weights that are not in ``path`` itself."""
    return path.with_name(f"{path.name}.index.json")


# ---------------------------------------------------------------- loading


@dataclass(frozen=True)
class Header:
    """What a safetensors file states about a tensor."""

    file: Path
    """File that contains the tensor."""
    shape: tuple[int, ...]
    """Shape of the tensor."""
    dtype: str
    """Name of its dtype in safetensors files."""


def load_weights(
    net: nn.Module,
    path: Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    ignored: Collection[str] = (),
) -> None:
    """Loads safetensors into a network. All names, shapes and dtypes are checked before any tensor is read.

    Args:
        net: The network. One on the meta device receives storage. Any other keeps its own, which may be shards of a
            distributed network.
        path: Path of ``model.safetensors``. If this file does not exist, the shards listed in
            ``model.safetensors.index.json`` in the same folder are read.
        device: Device for the storage of a network on the meta device. Defaults to the CPU.
        dtype: Dtype for the floating-point tensors of a network on the meta device. Defaults to that of the network.
        ignored: Names of tensors that may be stored although the network has none of them. Defaults to none.

    Raises:
        ModelFolderError: A file is missing or damaged; or tensors are missing, unexpected, not finite, or of the wrong
            shape or dtype. The message names them.
        FileError: The index is damaged.
    """
    expected = net.state_dict()
    headers = {n: header for n, header in read_headers(path).items() if n in expected or n not in ignored}
    _check_fit(path, expected, headers)
    loaded: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in _tensors(headers):
            target = expected[name]
            _check_finite(tensor, name, headers[name].file)
            if target.is_meta:
                target_dtype = dtype if dtype is not None and target.is_floating_point() else target.dtype
                loaded[name] = tensor.to(device or "cpu", target_dtype, copy=True)
            else:
                copy_shard(target, tensor.to(target.dtype))
            del tensor
    if loaded:
        net.load_state_dict(loaded, assign=True)


def _tensors(headers: Mapping[str, Header]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of files. Opening a file again releases the memory-mapped pages of what was read before."""
    for file in dict.fromkeys(header.file for header in headers.values()):
        # At most 8 bytes per number.
        sizes = {name: 8 * math.prod(header.shape) for name, header in headers.items() if header.file == file}
        for names in _assign_shards(sizes, MAPPED_BYTES):
            with safe_open(file, "pt") as shard:
                for name in names:
                    yield name, shard.get_tensor(name)


def read_headers(path: Path) -> dict[str, Header]:
    """Reads what weights state about their tensors; no tensor is read.

    Args:
        path: As for `load_weights`.

    Raises:
        ModelFolderError: A file is missing or damaged, or the index does not match the files.
        FileError: The index is damaged.
    """
    if path.is_file():
        return _headers_of_file(path)
    index = index_path(path)
    if not index.is_file():
        raise ModelFolderError(f"{path} is missing: expected weights as safetensors")
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ModelFolderError(f"{index} has no weight_map of tensor names to files")
    headers: dict[str, Header] = {}
    for file in dict.fromkeys(where.values()):
        if Path(file).name != file or len(file) > MAX_NAME:
            raise ModelFolderError(f"{index} names a file outside its folder: {file[:MAX_NAME]}")
        if not path.with_name(file).is_file():
            raise ModelFolderError(f"{path.with_name(file)} is missing: copy or download the model again")
        stored = _headers_of_file(path.with_name(file))
        listed = {name for name, place in where.items() if place == file}
        if listed != stored.keys():
            different = ", ".join(sorted(listed ^ stored.keys())[:5])
            raise ModelFolderError(f"{index} and {file} do not list the same tensors ({different})")
        headers |= stored
    return {name: headers[name] for name in where}


def _headers_of_file(path: Path) -> dict[str, Header]:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: Header(path, tuple(part.get_shape()), str(part.get_dtype())) for n, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path} is not a readable safetensors file: {error}{substitute_hint(path)}") from None


def _check_fit(path: Path, expected: Mapping[str, Tensor], headers: Mapping[str, Header]) -> None:
    """Compares names, shapes and dtypes."""
    if problems := misfit(expected.keys(), headers.keys(), lambda n: _mismatches(n, expected[n], headers[n])):
        raise ModelFolderError(f"{path} does not fit its config.json: {problems}")


def misfit(expected: Set[str], found: Set[str], mismatches: Callable[[str], Iterable[str]]) -> str:
    """Describes how stored tensors differ from expected ones; empty if they fit.

    Args:
        expected: Names of the expected tensors.
        found: Names of the stored tensors.
        mismatches: Returns the differences of a tensor that is in both.
    """
    problems = [f"missing {name}" for name in sorted(expected - found)]
    problems += [f"unexpected {name}" for name in sorted(found - expected)]
    problems += [problem for name in sorted(expected & found) for problem in mismatches(name)]
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


def _mismatches(name: str, target: Tensor, stored: Header) -> Iterable[str]:
    if stored.shape != tuple(target.shape):
        yield f"{name} has shape {stored.shape}, expected {tuple(target.shape)}"
    accepted = FLOATS if target.is_floating_point() else (INTEGERS.get(target.dtype, ""),)
    if stored.dtype not in accepted:
        yield f"{name} is stored as {stored.dtype}, expected {' or '.join(accepted)}"


def _check_finite(tensor: Tensor, name: str, path: Path) -> None:
    # The extremes propagate NaN, and need no temporary tensor.
    if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise ModelFolderError(f"{path} contains values that are not finite, in {name}: the weights are unusable")


# ---------------------------------------------------------------- networks of untrusted configurations


MAX_NUMBER = 2**16
"""Numbers up to this one are accepted in any configuration: image sizes are not dimensions of tensors."""
MAX_LENGTH = 2**16
"""Limit of the characters of a text and of the entries of a list in a configuration."""


def check_numbers(values: Mapping[str, Any], headers: Mapping[str, Header], where: str) -> None:
    """Checks that a configuration states no number beyond what its weights can have.

    Args:
        values: Fields of the configuration.
        headers: Headers of the weights.
        where: The file, for errors.

    Raises:
        ModelFolderError: A number is larger than all dimensions of the weights, or a text or list is too long.
    """
    limit = max([MAX_NUMBER, *(size for header in headers.values() for size in header.shape)])
    for name, value in values.items():
        if isinstance(value, str | list | tuple) and len(value) > MAX_LENGTH:
            raise ModelFolderError(f"{where}: {name} has a length of {len(value)}, more than {MAX_LENGTH}")
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int | float) and abs(number) > limit:
                raise ModelFolderError(
                    f"{where}: {name} has the number {str(number)[:20]}, which exceeds every dimension of the weights "
                    f"next to it (the limit is {limit}): the files do not belong together"
                )


def without_storage(make: Callable[[], Net], headers: Mapping[str, Header] | None = None) -> Net:
    """Builds a network on the meta device, or on the CPU if it computes buffers that its state dict does not hold.

    Args:
        make: Builds the network.
        headers: Headers of the weights that it will be given: building ends with an error as soon as the network has
            more parameters. Defaults to no limit.

    Raises:
        ModelFolderError: The network is larger than its weights, or cannot be built.
    """
    try:
        with shapes_only(), _at_most(None if headers is None else len(headers)):
            net = make()
    except (RuntimeError, OverflowError, TypeError) as error:  # of sizes that PyTorch cannot represent
        raise ModelFolderError(f"the network of the configuration cannot be built: {error}") from error
    stored = net.state_dict().keys()
    if not any(buffer.is_meta for name, buffer in net.named_buffers() if name not in stored):
        return net
    if headers:  # before the network gets storage
        _check_fit(next(iter(headers.values())).file, net.state_dict(), headers)
    return make()


@contextmanager
def _at_most(num_tensors: int | None) -> Iterator[None]:
    """Raises `ModelFolderError` when this thread gives modules more parameters than that."""
    if num_tensors is None:
        yield
        return
    thread, registered = get_ident(), 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal registered
        registered += parameter is not None and get_ident() == thread
        if registered > 2 * num_tensors:  # a module may replace a parameter, which then counts twice
            raise ModelFolderError(
                f"the network of the configuration has more parameters than the {num_tensors} tensors of its weights: "
                "the files do not belong together"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
