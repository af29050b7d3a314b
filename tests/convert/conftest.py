"""Weight files for several tests."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest


@pytest.fixture
def empty_safetensors() -> Callable[[Mapping[str, Sequence[int]], Path], Path]:
    """Writes a file with tensors of given shapes and no numbers on disk."""

    def write(layout: Mapping[str, Sequence[int]], path: Path) -> Path:
        header, end = {}, 0
        for name, shape in layout.items():
            start, end = end, end + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        return path

    return write
