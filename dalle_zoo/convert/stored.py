"""Tensors that are still in their file, and opened files.

Every range of bytes is checked against the file when it is opened, so that a later read can neither fail nor take more
memory than the range has bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_zoo.convert.pickles import Placeholder, WeightFileError

MAX_PICKLE_BYTES = 64 * 2**20
"""Size limit of the pickle in a weight file; it may also hold optimizer states and the like."""
MAX_TABLE_BYTES = 16 * 2**20
"""Size limit of the table of contents: JSON header, or directory of a zip archive. A tensor takes 100 to 200 bytes, so
that 80,000 fit; the largest models have thousands. When it is parsed it takes about 30 times its size."""
MAX_NODES = 500_000
"""Limit of containers and values that are searched for tensors; a pickle can refer to one a thousand times."""
MAX_DEPTH = 64
"""Maximum nesting of containers and modules that are searched for tensors."""
MAX_NAME = 300
"""Limit of the name of a tensor in characters."""
MAX_DIMENSIONS = 8
MAX_PARAMETERS = 10_000
"""Limit of values in hyper-parameters; a pickle can nest references to one list and so multiply it."""
MAX_SHARING = 100
"""Maximum size of all tensors relative to the file, as layers may share weights."""


@dataclass(eq=False)
class Storage:
    """A contiguous array of numbers in a file."""

    path: Path
    dtype: torch.dtype
    num_elements: int
    offset: int = -1
    """Offset in the file in bytes; set after the pickle is read, as torch's legacy format stores it there."""

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that is still in its file.

    Example:
        >>> import tempfile
        >>> from dalle_zoo.convert import open_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"vae.weight": torch.ones(2, 3), "step": 7}, path := Path(folder, "net.pt"))
        ...     tensor = open_checkpoint(path).tensors["vae.weight"]
        ...     tensor.shape, tensor.read().sum()
        ((2, 3), tensor(6.))
    """

    storage: Storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    """Index of the first element in the storage."""

    def __post_init__(self) -> None:
        numbers = (*self.shape, *self.stride, self.start)
        if any(type(n) is not int or not 0 <= n < 2**48 for n in numbers) or len(self.shape) != len(self.stride):
            raise WeightFileError("it has a tensor with an invalid shape, strides or offset")
        if len(self.shape) > MAX_DIMENSIONS:
            raise WeightFileError(f"it has a tensor of {len(self.shape)} dimensions, more than {MAX_DIMENSIONS}")
        if self.num_elements > self.storage.num_elements or self.start + self._span > self.storage.num_elements:
            raise WeightFileError(f"it has a tensor of shape {self.shape} that reaches beyond its storage")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in the file."""
        return self.storage.dtype

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)

    @property
    def _span(self) -> int:
        """Number of storage elements from the first to the last one of the tensor."""
        if not self.num_elements:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    def read(self) -> Tensor:
        """Returns the tensor, contiguous and on the CPU.

        Raises:
            WeightFileError: The file was truncated since it was opened.
        """
        if not self.num_elements:
            return torch.empty(self.shape, dtype=self.dtype)
        data = bytearray(self._span * self.dtype.itemsize)
        with self.storage.path.open("rb") as file:
            file.seek(self.storage.offset + self.start * self.dtype.itemsize)
            if file.readinto(data) != len(data):
                raise WeightFileError(f"{self.storage.path} ends too early: it is truncated")
        if self.dtype == torch.bool:  # bytes other than 0 and 1 are not valid booleans
            return torch.frombuffer(data, dtype=torch.uint8).as_strided(self.shape, self.stride).ne(0)
        return torch.frombuffer(data, dtype=self.dtype).as_strided(self.shape, self.stride).contiguous()


Tensors = Mapping[str, StoredTensor]
"""State dict whose tensors are still on disk."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened weight file, whose tensors are still on disk.

    Example:
        >>> import tempfile
        >>> from dalle_zoo.convert import open_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"vae.weight": torch.ones(2, 3), "step": 7}, path := Path(folder, "net.pt"))
        ...     checkpoint = open_checkpoint(path)
        ...     list(checkpoint.state_dict("vae.")), checkpoint.content["step"]
        (['weight'], 7)
    """

    path: Path
    format: str
    """"torch", "torch before 1.6", "safetensors" or "Flax"."""
    content: Any
    """Containers, numbers, text, `StoredTensor`, and `Placeholder` for other objects."""
    names: frozenset[str] = frozenset()
    """Full names of the classes and functions that a pickle asks for; none was imported."""

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors by their path through mappings and modules, joined by dots; tensors in lists are left out.

        Raises:
            WeightFileError: The content is nested too deeply or without end, or two tensors have the same name.
        """
        found: dict[str, StoredTensor] = {}
        waiting: list[tuple[str, int, Any]] = [("", 0, self.content)]
        num_nodes = num_bytes = 0
        while waiting:
            name, depth, node = waiting.pop()
            contents = _members(node)
            num_nodes += 1 + len(contents)  # counted first: a mapping that contains itself grows at every step
            if num_nodes > MAX_NODES or depth > MAX_DEPTH:
                raise WeightFileError(f"{self.path} nests its content too deeply or names it too often")
            if isinstance(node, StoredTensor):
                if name in found:
                    raise WeightFileError(f"{self.path} has two tensors of the name {name}")
                found[name] = node
                num_bytes += node.num_elements * node.dtype.itemsize
            else:
                members = [(_join(name, key), depth + 1, value) for key, value in contents]
                waiting.extend(reversed(members))
        if num_bytes > MAX_SHARING * self.path.stat().st_size:
            raise WeightFileError(
                f"{self.path} has tensors of {num_bytes} bytes, over {MAX_SHARING} times its own size"
            )
        return found

    def state_dict(self, prefix: str = "") -> dict[str, StoredTensor]:
        """Returns the tensors whose names start with a prefix ("state_dict.", "vae."), without the prefix."""
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}

    def summary(self) -> str:
        """Returns one line with format, tensors and classes, for messages."""
        names = list(self.tensors)
        some = ", ".join(f"{name} {list(self.tensors[name].shape)}" for name in names[:3])
        external = sorted(name for name in self.names if not name.startswith(("torch.", "collections.", "_codecs.")))
        objects = f"; objects of {', '.join(external[:5])}" if external else ""
        return f"a file of {self.format} with {len(names)} tensors{f' ({some}, ...)' if some else ''}{objects}"


def _join(prefix: str, key: str) -> str:
    name = f"{prefix}.{key}" if prefix and key else prefix or key
    if len(name) > MAX_NAME:
        raise WeightFileError(f"a tensor has a name of more than {MAX_NAME} characters")
    return name


def _members(node: Any) -> list[tuple[str, Any]]:
    """Returns the named members of a mapping or pickled module; the name "" adds nothing to the path."""
    if isinstance(node, Placeholder):
        parts = [node.attributes.get(part) for part in ("_parameters", "_buffers", "_modules")]
        pairs = [("", part) for part in parts if isinstance(part, dict)]
        return pairs + [(str(p[0]), p[1]) for p in node.items if isinstance(p, tuple) and isinstance(p[0], str)]
    if isinstance(node, dict):
        return [(str(key), value) for key, value in node.items() if type(key) in (str, int)]
    return []


def check_small(stated: Any, where: str) -> None:
    """Raises `WeightFileError` if there are too many hyper-parameters to compare and print."""
    waiting, num_values = [stated], 0
    while waiting:
        value = waiting.pop()
        parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        if isinstance(parts, list | tuple | set | frozenset):
            num_values += len(parts)
            if num_values > MAX_PARAMETERS:
                raise WeightFileError(f"{where} has more than {MAX_PARAMETERS} hyper-parameters")
            waiting.extend(parts)


def check_apart(ranges: Mapping[str, tuple[int, int]], end: int) -> None:
    """Raises `WeightFileError` unless ranges (first byte, length) are within ``end`` bytes and do not overlap."""
    ordered = sorted((start, size, name) for name, (start, size) in ranges.items() if size)
    for start, size, name in ordered:
        if start < 0 or start + size > end:
            raise WeightFileError(f"{name[:100]!r} reaches beyond the end of the file: it is truncated or damaged")
    for (start, size, name), (after, _, other) in pairwise(ordered):
        if start + size > after:
            raise WeightFileError(f"{name[:100]!r} and {other[:100]!r} overlap: it is damaged, or an attack")
