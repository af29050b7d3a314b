"""Files of tensors, read lazily and without running anything: torch's two formats and safetensors.

Opening a file reads its table of contents alone. A tensor is a range of bytes of the file; every range is checked
against the file when it is opened, so that reading one later can neither fail nor take more memory than it has bytes.
Formats: ``torch.save`` since 1.6 (a zip archive with a pickle), before (a row of pickles, then the numbers), and
safetensors (a JSON header, then the numbers).
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dalle_zoo.convert.pickles import BUILDERS, Placeholder, Reference, WeightFileError, load_objects

MAX_TABLE_BYTES = 64 * 2**20
"""Longest table of contents: pickle, JSON header or directory of a zip archive."""
MAX_ENTRIES = 200_000
"""Most entries of an archive."""
MAX_NODES = 1_000_000
"""Most containers and values that are walked through in search of tensors; a pickle can name one a thousand times."""
MAX_DEPTH = 64
"""Deepest nesting of containers and modules in which tensors are searched."""
MAX_NAME = 1_000
"""Characters of the longest name of a tensor."""
MAX_DIMENSIONS = 8
MAX_SHARING = 100
"""Bytes of all tensors together, as a multiple of the file's: layers may share weights."""

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(eq=False)
class Storage:
    """A row of numbers in a file."""

    path: Path
    dtype: torch.dtype
    num_elements: int
    offset: int = -1
    """Where it begins, bytes; known only after the pickle in torch's older format."""

    @property
    def num_bytes(self) -> int:
        """Its length in the file."""
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that is still in its file."""

    storage: Storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    """Index of the first element in the storage."""

    def __post_init__(self) -> None:
        numbers = (*self.shape, *self.stride, self.start)
        if any(type(n) is not int or not 0 <= n < 2**48 for n in numbers) or len(self.shape) != len(self.stride):
            raise WeightFileError("it has a tensor whose shape, strides or start are no sizes")
        if len(self.shape) > MAX_DIMENSIONS:
            raise WeightFileError(f"it has a tensor of {len(self.shape)} dimensions, more than {MAX_DIMENSIONS}")
        if self.num_elements > self.storage.num_elements or self.start + self._span > self.storage.num_elements:
            raise WeightFileError(f"it has a tensor of shape {self.shape} that reaches beyond its storage")

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.storage.dtype

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)

    @property
    def _span(self) -> int:
        """Elements from the first to the last."""
        if not self.num_elements:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    def read(self) -> Tensor:
        """The tensor itself, contiguous on the CPU.

        Raises:
            WeightFileError: The file was cut since it was opened.
        """
        if not self.num_elements:
            return torch.empty(self.shape, dtype=self.dtype)
        data = bytearray(self._span * self.dtype.itemsize)
        with self.storage.path.open("rb") as file:
            file.seek(self.storage.offset + self.start * self.dtype.itemsize)
            if file.readinto(data) != len(data):
                raise WeightFileError(f"{self.storage.path} ends too early: it is truncated")
        if self.dtype == torch.bool:  # other bytes than 0 and 1 are no booleans
            return torch.frombuffer(data, dtype=torch.uint8).as_strided(self.shape, self.stride).ne(0)
        return torch.frombuffer(data, dtype=self.dtype).as_strided(self.shape, self.stride).contiguous()


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A file of weights, opened; its tensors are still on disk."""

    path: Path
    format: str
    """"torch", "torch before 1.6" or "safetensors"."""
    content: Any
    """Containers, numbers, text, `StoredTensor`, and `Placeholder` for other objects."""
    names: frozenset[str] = frozenset()
    """Full names of the classes and functions that a pickle asked for; none was imported."""

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors by their path through mappings and modules, joined by dots; those in lists are left out.

        Raises:
            WeightFileError: The content is nested too deeply or endlessly, or two tensors have one name.
        """
        found: dict[str, StoredTensor] = {}
        waiting: list[tuple[str, int, Any]] = [("", 0, self.content)]
        num_nodes = num_bytes = 0
        while waiting:
            name, depth, node = waiting.pop()
            num_nodes += 1
            if num_nodes > MAX_NODES or depth > MAX_DEPTH:
                raise WeightFileError(f"{self.path} nests its content too deeply or names it too often")
            if isinstance(node, StoredTensor):
                if name in found:
                    raise WeightFileError(f"{self.path} has two tensors of the name {name}")
                found[name] = node
                num_bytes += node.num_elements * node.dtype.itemsize
            else:
                members = [(_join(name, key), depth + 1, value) for key, value in _members(node)]
                waiting.extend(reversed(members))
        if num_bytes > MAX_SHARING * self.path.stat().st_size:
            raise WeightFileError(
                f"{self.path} has tensors of {num_bytes} bytes, over {MAX_SHARING} times its own size"
            )
        return found

    def state_dict(self, prefix: str = "") -> dict[str, StoredTensor]:
        """Tensors below a prefix ("state_dict.", "vae."), which is taken off."""
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}

    def summary(self) -> str:
        """One line for messages: format, tensors, classes."""
        names = list(self.tensors)
        some = ", ".join(f"{name} {list(self.tensors[name].shape)}" for name in names[:3])
        foreign = sorted(name for name in self.names if not name.startswith(("torch.", "collections.", "_codecs.")))
        objects = f"; objects of {', '.join(foreign[:5])}" if foreign else ""
        return f"a file of {self.format} with {len(names)} tensors{f' ({some}, ...)' if some else ''}{objects}"


def _join(prefix: str, key: str) -> str:
    name = f"{prefix}.{key}" if prefix and key else prefix or key
    if len(name) > MAX_NAME:
        raise WeightFileError(f"a tensor has a name of more than {MAX_NAME} characters")
    return name


def _members(node: Any) -> list[tuple[str, Any]]:
    """Named things in a mapping or in a pickled module; "" adds nothing to the name."""
    if isinstance(node, Placeholder):
        parts = [node.attributes.get(part) for part in ("_parameters", "_buffers", "_modules")]
        pairs = [("", part) for part in parts if isinstance(part, dict)]
        return pairs + [(str(p[0]), p[1]) for p in node.items if isinstance(p, tuple) and isinstance(p[0], str)]
    if isinstance(node, dict):
        return [(str(key), value) for key, value in node.items() if type(key) in (str, int)]
    return []


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a file of weights; no tensor is read, and nothing that the file asks for is run.

    Args:
        path: The file. Its ending does not matter.

    Raises:
        WeightFileError: It is none of the formats, damaged, or asks for more than weights need.
        FileNotFoundError: It is missing.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
            file.seek(0)
            if start.startswith(_ZIP):
                opened = _open_zip(path, file)
            elif start[8:] == b"{":  # behind the length of a header, whose first byte may be any
                opened = _open_safetensors(path, file)
            elif start.startswith(_PICKLE):
                opened = _open_legacy(path, file)
            else:
                raise WeightFileError("it begins like neither a file of torch nor one of safetensors")
            _ = opened.tensors  # which checks them
            return opened
    except WeightFileError as error:
        text = str(error)
        raise WeightFileError(text if str(path) in text else f"{path} is not opened: {text}") from None


# ---------------------------------------------------------------- torch


def _tensor(storage: Any, start: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    """Stands in for ``torch._utils._rebuild_tensor_v2``; gradients, hooks and metadata are dropped."""
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise WeightFileError("it has a tensor without storage, shape or strides")
    return StoredTensor(storage, shape, stride, start)


def _parameter(tensor: Any, *_: Any) -> Any:
    """Stands in for ``torch._utils._rebuild_parameter``."""
    if not isinstance(tensor, StoredTensor):
        raise WeightFileError("it has a parameter that is no tensor")
    return tensor


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    """Stands in for ``torch.Size``."""
    return tuple(sizes)


_TORCH: dict[str, Callable[..., Any]] = {
    **BUILDERS,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}


class _Storages:
    """Storages that a pickle of torch refers to, by their key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_key: dict[str, Storage] = {}

    def __call__(self, identifier: Any) -> Any:
        """What a persistent identifier stands for: a storage, or a class whose source code is beside it."""
        if not isinstance(identifier, tuple) or not identifier:
            raise WeightFileError("it refers to something other than a storage")
        if identifier[0] == "module" and len(identifier) == 4:
            return identifier[1]
        if identifier[0] != "storage" or len(identifier) not in (5, 6):
            raise WeightFileError("it refers to something other than a storage")
        _, kind, key, _, num_elements = identifier[:5]
        if identifier[5:] not in ((), (None,)):
            raise WeightFileError(
                "it has views of storages, as torch before 0.4 wrote them: save it again with a newer one"
            )
        module, _, name = kind.name.rpartition(".") if isinstance(kind, Reference) else ("", "", "")
        if module not in ("torch", "torch.cuda") or name not in _STORAGES:
            raise WeightFileError(f"it has a storage of the kind {str(kind)[:100]}, expected {', '.join(_STORAGES)}")
        if not isinstance(key, str) or type(num_elements) is not int or not 0 <= num_elements < 2**48:
            raise WeightFileError("it has a storage without a key or a size")
        storage = self.by_key.setdefault(key, Storage(self.path, _STORAGES[name], num_elements))
        if (storage.dtype, storage.num_elements) != (_STORAGES[name], num_elements):
            raise WeightFileError(f"it gives the storage {key[:100]!r} two kinds or sizes")
        return storage


def _open_zip(path: Path, file: BinaryIO) -> Checkpoint:
    """``torch.save`` since 1.6: ``NAME/data.pkl`` and a file ``NAME/data/KEY`` for every storage, not compressed."""
    entries = _zip_entries(path, file)
    tops = {name.split("/")[0] for name in entries}
    if len(tops) != 1:
        raise WeightFileError("it is an archive of more than one folder: expected one that torch.save wrote")
    top = tops.pop()
    if any(name.startswith(f"{top}/code/") for name in entries):
        raise WeightFileError("it is a TorchScript program: expected weights")
    if f"{top}/data.pkl" not in entries:
        raise WeightFileError("it is an archive without data.pkl: expected one that torch.save wrote")
    if f"{top}/byteorder" in entries:
        start, size = entries[f"{top}/byteorder"]
        file.seek(start)
        if file.read(min(size, 6)) != b"little":
            raise WeightFileError("its numbers are not little-endian: save it again on a usual machine")
    start, size = entries[f"{top}/data.pkl"]
    if size > MAX_TABLE_BYTES:
        raise WeightFileError(f"its pickle has {size} bytes, more than {MAX_TABLE_BYTES}")
    file.seek(start)
    storages = _Storages(path)
    content, names = load_objects(file, size, _TORCH, storages)
    for key, storage in storages.by_key.items():
        storage.offset, length = entries.get(f"{top}/data/{key}", (-1, -1))
        if storage.num_bytes != length:
            raise WeightFileError(
                f"its storage {key[:100]!r} should have {storage.num_bytes} bytes, but "
                + (f"has {length}" if length >= 0 else "is missing")
            )
    return Checkpoint(path, "torch", content, names)


def _zip_entries(path: Path, file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Name to (first byte, length) of every entry of an archive; each lies in the file and by itself."""
    try:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if end is None or end[zipfile._ECD_SIZE] > MAX_TABLE_BYTES:  # type: ignore[attr-defined]
            raise WeightFileError("its archive has no directory, or one that is too long: it is truncated or damaged")
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except WeightFileError:
        raise
    except Exception as error:  # zipfile lets errors of struct and of text through
        raise WeightFileError(f"its archive is damaged ({type(error).__name__}: {str(error)[:200]})") from None
    if len(infos) > MAX_ENTRIES:
        raise WeightFileError(f"its archive has {len(infos)} entries, more than {MAX_ENTRIES}")
    entries: dict[str, tuple[int, int]] = {}
    for info in infos:
        name = info.orig_filename
        if name in entries:
            raise WeightFileError(f"its archive has two entries {name[:100]!r}")
        if name.startswith("/") or "\\" in name or "\0" in name or ":" in name or ".." in name.split("/"):
            raise WeightFileError(f"its archive has an entry {name[:100]!r}, which leads out of its folder")
        if info.flag_bits & 1:
            raise WeightFileError(f"its entry {name[:100]!r} is encrypted")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise WeightFileError(
                f"its entry {name[:100]!r} is compressed, {info.compress_size} bytes for {info.file_size}: torch.save "
                f"never does that"
            )
        entries[name] = (_data_start(file, info), info.file_size)
    _check_apart(entries, path.stat().st_size)
    return entries


def _data_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """First byte of an entry's data, behind its own header."""
    file.seek(max(info.header_offset, 0))
    header = file.read(30)
    if info.header_offset < 0 or len(header) != 30 or not header.startswith(_ZIP):
        raise WeightFileError(f"its entry {info.orig_filename[:100]!r} is not where the archive's directory says")
    name_length, extra_length = struct.unpack("<HH", header[26:])
    return info.header_offset + 30 + int(name_length) + int(extra_length)


def _check_apart(ranges: Mapping[str, tuple[int, int]], end: int) -> None:
    """Raises unless ranges of bytes, (first, length), lie before ``end`` and do not overlap."""
    ordered = sorted((start, size, name) for name, (start, size) in ranges.items() if size)
    for start, size, name in ordered:
        if start < 0 or start + size > end:
            raise WeightFileError(f"{name[:100]!r} reaches beyond the end of the file: it is truncated or damaged")
    for (start, size, name), (after, _, other) in pairwise(ordered):
        if start + size > after:
            raise WeightFileError(f"{name[:100]!r} and {other[:100]!r} overlap: it is damaged, or an attack")


def _open_legacy(path: Path, file: BinaryIO) -> Checkpoint:
    """``torch.save`` before 1.6: five pickles (magic number, version, machine, content, keys), then the storages."""
    end = path.stat().st_size

    def load(**options: Any) -> tuple[Any, frozenset[str]]:
        return load_objects(file, min(MAX_TABLE_BYTES, end - file.tell()), **options)

    magic = load()[0]
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise WeightFileError("it is a pickle, but not one of torch.save: expected weights")
    if load()[0] != _LEGACY_VERSION:
        raise WeightFileError("it is of an unknown version of torch's older format")
    machine = load()[0]
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise WeightFileError("its numbers are not little-endian: save it again on a usual machine")
    storages = _Storages(path)
    content, names = load(builders=_TORCH, persistent=storages)
    keys = load()[0]
    if not isinstance(keys, list) or any(not isinstance(key, str) for key in keys):
        raise WeightFileError("it does not list its storages")
    if sorted(keys) != sorted(storages.by_key):
        raise WeightFileError("it lists other storages than its tensors have")
    for key in keys:
        storage = storages.by_key[key]
        header = file.read(8)
        if len(header) != 8 or struct.unpack("<q", header)[0] != storage.num_elements:
            raise WeightFileError(
                f"its storage {key[:100]!r} should have {storage.num_elements} elements, but has others"
            )
        storage.offset = file.tell()
        if storage.offset + storage.num_bytes > end:
            raise WeightFileError(f"its storage {key[:100]!r} reaches beyond the end of the file: it is truncated")
        file.seek(storage.num_bytes, 1)
    return Checkpoint(path, "torch before 1.6", content, names)


# ---------------------------------------------------------------- safetensors


def _open_safetensors(path: Path, file: BinaryIO) -> Checkpoint:
    """Eight bytes with the length of a JSON header, the header, the numbers."""
    end = path.stat().st_size
    length = struct.unpack("<Q", file.read(8))[0]
    if length > MAX_TABLE_BYTES or 8 + length > end:
        raise WeightFileError(f"its header should have {length} bytes: it is truncated, damaged or too long")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except WeightFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise WeightFileError(f"its header is not valid JSON ({type(error).__name__}: {str(error)[:200]})") from None
    content, ranges = {}, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise WeightFileError(
                f"the entry {name[:100]!r} of its header must have dtype, shape and data_offsets alone"
            )
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in _SAFETENSORS:
            raise WeightFileError(f"{name[:100]!r} has the dtype {str(kind)[:20]}, expected {', '.join(_SAFETENSORS)}")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise WeightFileError(f"{name[:100]!r} has a shape or offsets that are no sizes")
        num_bytes = math.prod(shape) * _SAFETENSORS[kind].itemsize
        if num_bytes != offsets[1] - offsets[0]:
            raise WeightFileError(
                f"{name[:100]!r} of shape {shape} should have {num_bytes} bytes, but has {offsets[1] - offsets[0]}"
            )
        start = 8 + length + offsets[0]
        ranges[name] = (start, num_bytes)
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        content[name] = StoredTensor(
            Storage(path, _SAFETENSORS[kind], math.prod(shape), start), tuple(shape), stride, 0
        )
    _check_apart(ranges, end)
    return Checkpoint(path, "safetensors", content)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise WeightFileError(f"its header has {key[:100]!r} twice")
        found[key] = value
    return found


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n < 2**48 for n in values)
    )
