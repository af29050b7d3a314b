"""The result of a call: grids, files, notebooks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_zoo.image_settings import ImageSettings, read_settings
from dalle_zoo.images import make_grid, to_pil
from dalle_zoo.pipeline import PipelineOutput

IMAGES = torch.randint(256, (5, 3, 4, 6), generator=torch.Generator().manual_seed(0)) / 255
KINDS = pytest.mark.parametrize(
    "images", [to_pil(IMAGES), IMAGES, IMAGES.permute(0, 2, 3, 1).numpy()], ids=["pil", "pt", "np"]
)
CODES = PipelineOutput(torch.zeros(2, 3, 4, dtype=torch.long))


@KINDS
@pytest.mark.parametrize(("columns", "wide"), [(None, 3), (1, 1), (4, 4), (9, 5)])
def test_a_grid_of_any_kind_of_image(images: Any, columns: int | None, wide: int) -> None:
    grid = np.asarray(PipelineOutput(images).grid(columns))
    assert np.array_equal(grid, make_grid(IMAGES, wide).permute(1, 2, 0).numpy())


@KINDS
def test_a_notebook_shows_the_grid(images: Any) -> None:
    output = PipelineOutput(images)
    shown = output._repr_png_()
    assert shown is not None
    with Image.open(io.BytesIO(shown)) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), np.asarray(output.grid()))


@KINDS
def test_saved_images_carry_their_settings(images: Any, tmp_path: Path) -> None:
    settings = [ImageSettings(prompt=f"image {k}", seed=k, model="tiny", score=k / 4) for k in range(5)]
    paths = PipelineOutput(images, settings=settings).save(tmp_path / "new/folder")
    assert paths == [tmp_path / f"new/folder/{k:03d}.png" for k in range(5)]
    assert [read_settings(path) for path in paths] == settings
    for path, expected in zip(paths, to_pil(IMAGES), strict=True):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_images_without_settings_are_saved_too(tmp_path: Path) -> None:
    (path,) = PipelineOutput(IMAGES[:1]).save(tmp_path)
    with Image.open(path) as image:
        assert image.size == (6, 4)
        assert not image.info


def test_codes_are_no_images(tmp_path: Path) -> None:
    assert CODES._repr_png_() is None
    for use in (CODES.grid, lambda: CODES.save(tmp_path / "new")):
        with pytest.raises(ValueError, match="the output holds codes: decode them"):
            use()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("columns", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_a_grid_has_columns(columns: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="columns must be an integer"):
        PipelineOutput(IMAGES).grid(columns)
