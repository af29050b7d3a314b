"""Images: bytes, PIL images, grids and files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_zoo.images import (
    from_pil,
    image_rows,
    make_grid,
    save_images,
    save_png,
    to_pil,
    to_uint8,
)
from dalle_zoo.workspaces import claimed_folder


def test_bytes_are_rounded_and_clamped() -> None:
    pixels = torch.tensor([-0.5, 0.0, 0.499 / 255, 0.501 / 255, 0.5, 254.6 / 255, 1.0, 1.5], requires_grad=True)
    assert to_uint8(pixels).tolist() == [0, 0, 0, 1, 128, 255, 255, 255]
    assert to_uint8(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.uint8


def test_there_and_back() -> None:
    images = torch.randint(256, (2, 3, 4, 6), generator=torch.Generator().manual_seed(0)) / 255
    pil_images = to_pil(images)
    assert [(p.mode, p.size) for p in pil_images] == [("RGB", (6, 4))] * 2
    assert pil_images[1].getpixel((5, 2)) == tuple(to_uint8(images)[1, :, 2, 5].tolist())
    for pil_image, image in zip(pil_images, images, strict=True):
        assert torch.equal(from_pil(pil_image), image)
    assert from_pil(Image.new("L", (3, 2), 255)).tolist() == torch.ones(3, 2, 3).tolist()


def test_a_grid_goes_row_by_row_on_white() -> None:
    images = torch.zeros(5, 3, 4, 6) + torch.arange(5).view(5, 1, 1, 1) / 10
    grid = make_grid(images, columns=3, pad=2)
    assert grid.dtype == torch.uint8
    assert grid.shape == (3, 2 * 6 + 2, 3 * 8 + 2)
    seen = torch.full_like(grid, 255)
    for index, (top, left) in enumerate([(2, 2), (2, 10), (2, 18), (8, 2), (8, 10)]):
        seen[:, top : top + 4, left : left + 6] = to_uint8(images[index])
    assert torch.equal(grid, seen)


def test_rows_of_images_stand_one_above_the_other() -> None:
    above, below = torch.zeros(3, 3, 2, 2), torch.full((3, 3, 2, 2), 0.4)
    image = image_rows(above, below)
    assert torch.equal(image, make_grid(torch.cat([above, below]), columns=3))
    assert image[0, 2, 2] == 0
    assert image[0, 6, 2] == 102


def test_an_image_is_saved_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = make_grid(torch.rand(2, 3, 4, 4), columns=2)
    path = save_png(grid, tmp_path / "new/grid.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.array(image), grid.permute(1, 2, 0).numpy())
    with pytest.raises(ValueError, match=r"path must end in \.png"):
        save_png(grid, tmp_path / "grid.jpg")
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(Image.new("RGB", (2, 2)), path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    save_png(Image.new("RGB", (2, 2), "red"), str(path))
    with Image.open(path) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_images_of_a_killed_call_are_removed_by_the_next(
    tmp_path: Path, killed_states: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    root = tmp_path / "root"
    root.mkdir()
    old, new, last = (
        {f"{number}.png": (Image.new("L", (1, 1), color), None) for number in range(count)}
        for color, count in ((1, 3), (2, 2), (3, 1))
    )
    save_images(old, root)
    with killed_states(root):
        save_images(new, root)
    for state in sorted((tmp_path / "killed").iterdir()):
        with claimed_folder(state):
            save_images(last, state)
        assert sorted(path.name for path in state.iterdir()) == [".sha256.json", "0.png"]
