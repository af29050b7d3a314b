"""Opens safetensors files."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.convert.stored import MAX_DIMENSIONS, MAX_TABLE_BYTES, Checkpoint, Storage, StoredTensor, check_apart
from dalle_zoo.plain_data import PlainDataError, json_value, unique_keys

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


def open_safetensors(path: Path, file: BinaryIO) -> Checkpoint:
    """Opens a file of eight bytes with the length of a JSON header, the header, and the numbers."""
    end = path.stat().st_size
    length = struct.unpack("<Q", file.read(8))[0]
    if length > MAX_TABLE_BYTES or 8 + length > end:
        raise WeightFileError(
            f"its header should have {length} bytes, but the file has {end} and the limit is {MAX_TABLE_BYTES}: it is "
            "truncated, damaged or too long"
        )
    try:
        header = json_value(file.read(length), pairs=unique_keys)
    except PlainDataError as error:
        raise WeightFileError(f"its header {error}") from None
    content, ranges = {}, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise WeightFileError(
                f"the entry {name[:100]!r} of its header must have exactly dtype, shape and data_offsets"
            )
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in _SAFETENSORS:
            raise WeightFileError(f"{name[:100]!r} has the dtype {str(kind)[:20]}, expected {', '.join(_SAFETENSORS)}")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise WeightFileError(f"{name[:100]!r} has an invalid shape or invalid offsets")
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
    check_apart(ranges, end)
    return Checkpoint(path, "safetensors", content)


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n < 2**48 for n in values)
    )
