"""Regions of an image that generation keeps: crops, cells of a mask, shifts."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from dalle_zoo.images import from_pil
from dalle_zoo.regions import cells_to_sample, crop_box, fit_image, following, ranks_by_likelihood, shift_image
from dalle_zoo.sampling import SAMPLE

SIZES = [((8, 8), (2, 2)), ((8, 12), (2, 3)), ((12, 8), (3, 2)), ((16, 16), (4, 4))]
"""Size of a model's images and of its code grid, height first."""


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (56, 56)])
@pytest.mark.parametrize("image", [(8, 8), (30, 20), (20, 31), (5, 7), (64, 9), (29, 29), (29, 3001)])
def test_an_image_is_cropped_as_pillow_fits_it(image: tuple[int, int], size: tuple[int, int]) -> None:
    photo = noise(*image)
    expected = ImageOps.fit(photo, (size[1], size[0]), Image.Resampling.LANCZOS)
    # The boxes differ in rounding only, which moves a byte by at most one.
    assert (fit_image(photo, size) - from_pil(expected)).abs().max() <= 1.01 / 255


def test_the_crop_is_inside_every_image() -> None:
    for width in range(1, 300):
        for side in (24, 56, 64):
            left, top, right, bottom = crop_box((width, 301), (side, side))
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= 301


def expected_cells(white: list[tuple[int, int]], image: tuple[int, int], size: tuple[int, int], grid: tuple[int, int]):
    """Cells whose exact rectangle overlaps that of a white pixel."""
    width, height = image
    scale = min(Fraction(width, size[1]), Fraction(height, size[0]))
    left, top = (width - scale * size[1]) / 2, (height - scale * size[0]) / 2
    high, wide = scale * size[0] / grid[0], scale * size[1] / grid[1]
    cells = torch.zeros(grid, dtype=torch.bool)
    for row in range(grid[0]):
        for column in range(grid[1]):
            cells[row, column] = any(
                x < left + (column + 1) * wide and x + 1 > left + column * wide
                and y < top + (row + 1) * high and y + 1 > top + row * high
                for x, y in white
            )  # fmt: skip
    return cells


@pytest.mark.parametrize(("size", "grid"), SIZES)
@pytest.mark.parametrize("image", [(8, 8), (12, 8), (24, 24), (30, 20), (20, 31), (5, 7), (3, 2), (1, 1)])
def test_a_cell_is_sampled_if_a_white_pixel_touches_it(
    image: tuple[int, int], size: tuple[int, int], grid: tuple[int, int]
) -> None:
    rng = np.random.default_rng(sum(image))
    for count in (0, 1, 1, 1, 3):
        white = [(int(rng.integers(image[0])), int(rng.integers(image[1]))) for _ in range(count)]
        mask = Image.new("L", image)
        for place in white:
            mask.putpixel(place, 255)
        assert torch.equal(cells_to_sample(mask, size, grid), expected_cells(white, image, size, grid)), white


def test_masks_of_all_kinds() -> None:
    size, grid = (8, 8), (2, 2)
    expected = torch.tensor([[False, True], [False, False]])
    pixels = torch.zeros(8, 8)
    pixels[3, 4] = 1
    array = (pixels.numpy() * 255).astype(np.uint8)
    deep = Image.fromarray(array.astype(np.uint16) * 257)
    dark = Image.fromarray(np.full((8, 8), 20_000, np.uint16))  # below half of 65,535
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    clear.putpixel((4, 3), (0, 0, 0, 0))
    masks = [
        pixels,
        pixels.bool(),
        pixels / 2,
        Image.fromarray(array),
        Image.fromarray(array).convert("1"),
        deep,
        clear,
    ]
    for mask in masks:
        assert torch.equal(cells_to_sample(mask, size, grid), expected), mask
    assert not cells_to_sample(pixels / 2.1, size, grid).any()
    assert not cells_to_sample(dark, size, grid).any()
    with pytest.raises(ValueError, match=r"mask must be a PIL image or have shape \(8, 8\), got \(4, 8\)"):
        cells_to_sample(pixels[:4], size, grid)


def rotated(image: Image.Image) -> Image.Image:
    """The image with an EXIF orientation that viewers undo, as cameras write it."""
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[ExifTags.Base.Orientation] = 6
    return turned


def test_orientation_is_that_of_a_viewer() -> None:
    photo, mask = noise(20, 10), Image.new("L", (20, 10))
    mask.putpixel((13, 2), 255)
    assert torch.equal(fit_image(rotated(photo), (8, 8)), fit_image(photo, (8, 8)))
    assert cells_to_sample(mask, (8, 8), (2, 2)).tolist() == [[False, True], [False, False]]
    assert torch.equal(cells_to_sample(rotated(mask), (8, 8), (2, 2)), cells_to_sample(mask, (8, 8), (2, 2)))
    for mine, other in zip(shift_image(rotated(photo), 15, 0), shift_image(photo, 15, 0), strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(other))


@pytest.mark.parametrize(("right", "down"), [(0, 0), (3, 0), (-3, 0), (0, 2), (2, -1), (-4, -3), (5, 3)])
def test_a_shift_moves_an_image_and_masks_the_rest(right: int, down: int) -> None:
    photo = noise(6, 4)
    moved, mask = shift_image(photo, right, down)
    assert moved.size == mask.size == photo.size
    for x in range(6):
        for y in range(4):
            source = (x - right, y - down)
            inside = 0 <= source[0] < 6 and 0 <= source[1] < 4
            assert mask.getpixel((x, y)) == (0 if inside else 255)
            assert moved.getpixel((x, y)) == (photo.getpixel(source) if inside else (128, 128, 128))


@pytest.mark.parametrize("shift", [(6, 0), (-6, 0), (0, 4), (0, -9)])
def test_a_shift_that_leaves_nothing_is_refused(shift: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"leaves nothing of an image of \(6, 4\)"):
        shift_image(noise(6, 4), *shift)


def test_kept_cells_that_follow_a_sampled_one() -> None:
    given = torch.tensor([[1, 2], [SAMPLE, 3], [4, SAMPLE]])
    assert following(given).tolist() == [[False, False], [False, True], [True, False]]
    assert ranks_by_likelihood(given)
    for other in (None, torch.tensor([[1, 2], [3, SAMPLE]]), torch.tensor([[1, 2]]), torch.tensor([[SAMPLE, SAMPLE]])):
        assert not ranks_by_likelihood(other)
