"""Opens files of ``torch.save``: a zip archive with a pickle since 1.6, before that pickles and numbers."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dalle_zoo.convert.object_pickles import BUILDERS, load_objects
from dalle_zoo.convert.pickles import Reference, UnrelatedFileError, WeightFileError, shown
from dalle_zoo.convert.stored import (
    MAX_PICKLE_BYTES,
    MAX_TABLE_BYTES,
    Checkpoint,
    Storage,
    StoredTensor,
    check_apart,
)

MAX_ENTRIES = 200_000
"""Maximum number of entries of an archive."""

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
"""First bytes of the two formats."""

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_LEGACY_START = _LEGACY_MAGIC.to_bytes(10, "little")
"""Bytes that distinguish the legacy format from other pickles before the pickle is read."""
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


def _tensor(storage: Any, start: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    """Replaces ``torch._utils._rebuild_tensor_v2``; gradients, hooks and metadata are dropped."""
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise WeightFileError("it has a tensor without storage, shape or strides")
    return StoredTensor(storage, shape, stride, start)


def _parameter(tensor: Any, *_: Any) -> Any:
    """Replaces ``torch._utils._rebuild_parameter``."""
    if not isinstance(tensor, StoredTensor):
        raise WeightFileError("it has a parameter that is not a tensor")
    return tensor


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    """Replaces ``torch.Size``."""
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
    """Storages that a pickle of torch refers to, by key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_key: dict[str, Storage] = {}

    def __call__(self, identifier: Any) -> Any:
        """Returns the storage of a persistent identifier, or the class of one that comes with source code."""
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
            raise WeightFileError(f"it has a storage of the kind {shown(kind)}, expected {', '.join(_STORAGES)}")
        if not isinstance(key, str) or type(num_elements) is not int or not 0 <= num_elements < 2**48:
            raise WeightFileError("it has a storage without a key or a size")
        storage = self.by_key.setdefault(key, Storage(self.path, _STORAGES[name], num_elements))
        if (storage.dtype, storage.num_elements) != (_STORAGES[name], num_elements):
            raise WeightFileError(f"it gives the storage {key[:100]!r} two kinds or sizes")
        return storage


def open_zip(path: Path, file: BinaryIO) -> Checkpoint:
    """Opens a file of torch 1.6 or later: ``NAME/data.pkl`` and an uncompressed ``NAME/data/KEY`` per storage."""
    entries = _zip_entries(path, file)
    tops = {name.split("/")[0] for name in entries}
    if len(tops) != 1:
        raise UnrelatedFileError("it is an archive of more than one folder: expected one that torch.save wrote")
    top = tops.pop()
    if any(name.startswith(f"{top}/code/") for name in entries):
        raise UnrelatedFileError("it is a TorchScript program: expected weights")
    if f"{top}/byteorder" in entries:
        start, size = entries[f"{top}/byteorder"]
        file.seek(start)
        if file.read(min(size, 6)) != b"little":
            raise WeightFileError("its numbers are not little-endian: save it again on a little-endian machine")
    start, size = entries[f"{top}/data.pkl"]
    if size > MAX_PICKLE_BYTES:
        raise WeightFileError(f"its pickle has {size} bytes, more than {MAX_PICKLE_BYTES}")
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
    """Returns name to (first byte, length) of the entries of an archive, which are in the file and do not overlap."""
    try:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if end is None or end[zipfile._ECD_SIZE] > MAX_TABLE_BYTES:  # type: ignore[attr-defined]
            raise WeightFileError("its archive has no directory, or one that is too long: it is truncated or damaged")
        if end[zipfile._ECD_ENTRIES_TOTAL] > MAX_ENTRIES:  # type: ignore[attr-defined]
            raise WeightFileError(
                f"its archive has {end[zipfile._ECD_ENTRIES_TOTAL]} entries, "  # type: ignore[attr-defined]
                f"more than {MAX_ENTRIES}"
            )
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except WeightFileError:
        raise
    except Exception as error:  # zipfile does not catch errors of struct and of decoding
        raise WeightFileError(f"its archive is damaged ({type(error).__name__}: {str(error)[:200]})") from None
    if len(infos) != end[zipfile._ECD_ENTRIES_TOTAL]:  # type: ignore[attr-defined]
        raise WeightFileError("its archive does not have the number of entries that it states: it is damaged")
    if not any(re.fullmatch("[^/]+/data.pkl", info.orig_filename) for info in infos):
        raise UnrelatedFileError("it is an archive without data.pkl: expected one that torch.save wrote")
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
    check_apart(entries, path.stat().st_size)
    return entries


def _data_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Returns the offset of an entry's data, which follows its own header."""
    file.seek(max(info.header_offset, 0))
    header = file.read(30)
    if info.header_offset < 0 or len(header) != 30 or not header.startswith(ZIP):
        raise WeightFileError(f"its entry {info.orig_filename[:100]!r} is not where the archive's directory says")
    name_length, extra_length = struct.unpack("<HH", header[26:])
    return info.header_offset + 30 + int(name_length) + int(extra_length)


def open_legacy(path: Path, file: BinaryIO) -> Checkpoint:
    """Opens a file of torch before 1.6: pickles (magic number, version, machine, content, keys) and storages."""
    end = path.stat().st_size

    def load(**options: Any) -> tuple[Any, frozenset[str]]:
        return load_objects(file, min(MAX_PICKLE_BYTES, end - file.tell()), **options)

    if _LEGACY_START not in file.read(32):
        raise UnrelatedFileError("it is a pickle, but not one of torch.save: expected weights")
    file.seek(0)
    magic = load()[0]
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise WeightFileError("it does not start as files of torch.save do: it is damaged")
    if load()[0] != _LEGACY_VERSION:
        raise WeightFileError("it is of an unknown version of torch's older format")
    machine = load()[0]
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise WeightFileError("its numbers are not little-endian: save it again on a little-endian machine")
    storages = _Storages(path)
    content, names = load(builders=_TORCH, persistent=storages)
    keys = load()[0]
    if not isinstance(keys, list) or any(not isinstance(key, str) for key in keys):
        raise WeightFileError("it does not list its storages")
    if sorted(keys) != sorted(storages.by_key):
        raise WeightFileError("its list of storages differs from those of its tensors")
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
