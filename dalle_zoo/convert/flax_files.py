"""Opens files of Flax: one MessagePack mapping, in which arrays are extensions with shape, dtype and numbers.

Only the part of MessagePack (<https://github.com/msgpack/msgpack/blob/master/spec.md>) that Flax uses is supported.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import BinaryIO

import torch

from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.convert.stored import MAX_DEPTH, MAX_DIMENSIONS, MAX_NAME, MAX_NODES, Checkpoint, Storage, StoredTensor

_ARRAY = 1
"""Extension type of arrays in Flax."""
_CHUNKED = "__msgpack_chunked_array__"
_KINDS = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}

# Number of bytes after the first byte of a value that hold its length, or the number itself.
_MAPPINGS = {0xDE: 2, 0xDF: 4}
_TEXTS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BINARIES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_NUMBERS = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}


def is_mapping(start: bytes) -> bool:
    """Returns whether bytes start like a mapping whose first key is a text."""
    if len(start) < 6:
        return False
    key = 1 if 0x81 <= start[0] <= 0x8F else 1 + _MAPPINGS.get(start[0], -1)
    return key > 0 and (0xA1 <= start[key] <= 0xBF or start[key] in _TEXTS)


def open_flax(path: Path, file: BinaryIO) -> Checkpoint:
    """Opens a file that holds a mapping of names to mappings and arrays, and nothing else."""
    reader = _Reader(path, file)
    content = reader.mapping(reader.one(), 0)
    if file.tell() != reader.end:
        raise WeightFileError(f"it has {reader.end - file.tell()} bytes after its content: it is damaged")
    return Checkpoint(path, "Flax", content)


class _Reader:
    """Reads values at the current position of the file; skips the numbers of arrays."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.end = path, file, path.stat().st_size
        self.num_values = 0

    def bytes(self, count: int) -> bytes:
        if self.file.tell() + count > self.end:
            raise WeightFileError("it ends too early: it is truncated or damaged")
        return self.file.read(count)

    def one(self) -> int:
        return self.bytes(1)[0]

    def number(self, code: int, sizes: dict[int, int], what: str) -> int:
        if code not in sizes:
            raise WeightFileError(f"it has a value of the kind {code:#x}, expected {what}")
        return int.from_bytes(self.bytes(sizes[code]), "big")

    def size(self) -> int:
        code = self.one()
        return code if code < 0x80 else self.number(code, _NUMBERS, "a size")

    def text(self) -> str:
        code = self.one()
        length = code & 0x1F if 0xA0 <= code <= 0xBF else self.number(code, _TEXTS, "a text")
        if length > MAX_NAME:
            raise WeightFileError(f"it has a name of more than {MAX_NAME} characters")
        try:
            return self.bytes(length).decode()
        except UnicodeDecodeError:
            raise WeightFileError("it has a name that is not valid UTF-8: it is damaged") from None

    def mapping(self, code: int, depth: int) -> dict[str, object]:
        count = code & 0x0F if 0x80 <= code <= 0x8F else self.number(code, _MAPPINGS, "a mapping or an array")
        self.num_values += count
        if self.num_values > MAX_NODES or depth > MAX_DEPTH:
            raise WeightFileError("it nests its content too deeply or has too much of it")
        content: dict[str, object] = {}
        for _ in range(count):
            name = self.text()
            if name in content:
                raise WeightFileError(f"it has {name[:100]!r} twice")
            if name == _CHUNKED:
                raise WeightFileError("it has an array in chunks, which is not supported: save it with smaller arrays")
            code = self.one()
            extension = 0xD4 <= code <= 0xD8 or code in _EXTENSIONS
            content[name] = self.array(code) if extension else self.mapping(code, depth + 1)
        return content

    def array(self, code: int) -> StoredTensor:
        length = 1 << code - 0xD4 if 0xD4 <= code <= 0xD8 else self.number(code, _EXTENSIONS, "an array")
        kind = self.one()
        end = self.file.tell() + length
        if kind != _ARRAY or self.one() != 0x93:  # an array of three values
            raise WeightFileError(f"it has an extension of the kind {kind}, expected only arrays")
        dimensions = self.one() - 0x90
        if not 0 <= dimensions <= MAX_DIMENSIONS:
            raise WeightFileError("it has an array without a valid shape")
        shape = tuple(self.size() for _ in range(dimensions))
        dtype = _KINDS.get(name := self.text())
        if dtype is None:
            raise WeightFileError(f"it has an array of the kind {name[:20]!r}, expected {', '.join(_KINDS)}")
        num_bytes, start = self.number(self.one(), _BINARIES, "numbers of an array"), self.file.tell()
        if num_bytes != math.prod(shape) * dtype.itemsize or start + num_bytes != end or end > self.end:
            raise WeightFileError(f"it has an array of shape {shape} in {num_bytes} bytes: it is truncated or damaged")
        self.file.seek(end)
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(dimensions))
        return StoredTensor(Storage(self.path, dtype, math.prod(shape), start), shape, stride, 0)
