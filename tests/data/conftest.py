"""Small images and shards for the tests of the data package."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Members = Mapping[str, bytes]


class Make:
    """Makes images and tars."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    def image(seed: int = 0, size: tuple[int, int] = (12, 10), format: str = "PNG") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        return Make.encoded(Image.fromarray(pixels), format)

    @staticmethod
    def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    def members(self, start: int, stop: int, prefix: str = "s") -> dict[str, bytes]:
        """Complete samples with two captions each."""
        found = {}
        for i in range(start, stop):
            key = f"{prefix}{i:04d}"
            found[f"{key}.png"] = self.image(i)
            found[f"{key}.txt"] = f"thing {i}".encode()
            found[f"{key}.json"] = json.dumps({"captions": [f"thing {i}", f"one {i}"], "name": "x"}).encode()
        return found

    def tar(self, name: str, members: Members) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as archive:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return path

    def shards(self, *sizes: int, folder: str = "shards", ending: str = "tar") -> Path:
        start = 0
        for number, size in enumerate(sizes):
            self.tar(f"{folder}/{number:05d}.{ending}", self.members(start, start + size))
            start += size
        return self.root / folder


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return Make(tmp_path)
