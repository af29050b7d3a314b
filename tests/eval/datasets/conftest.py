"""A dataset whose images are never decoded."""

from __future__ import annotations

from pathlib import Path

import pytest
from dalle_zoo_eval.datasets import EvalDataset, Item


@pytest.fixture
def toy(tmp_path: Path) -> EvalDataset:
    """Twenty items with five captions, of which "a thing" is shared by all."""
    items = []
    for i in range(20):
        path = tmp_path / f"{i:02d}.png"
        path.write_bytes(bytes(i + 1))
        items.append(Item(key=f"{i:02d}", image=path, captions=("a thing", *(f"thing {i}, {c}" for c in range(4)))))
    return EvalDataset(name="toy:all", root=tmp_path, items=tuple(items))
