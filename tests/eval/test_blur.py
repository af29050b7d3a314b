"""Blur: Pillow's filter, several radii of one image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dalle_zoo_eval.blur import gaussian_blur
from PIL import Image, ImageFilter


@pytest.fixture
def images() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=random) for size in ((20, 30), (33, 16))]


def test_blur_equals_pillow_filter(images: list[torch.Tensor]) -> None:
    blurred = gaussian_blur(images, (0, 1, 2, 4, 8))
    assert list(blurred) == [0, 1, 2, 4, 8]
    for radius, results in blurred.items():
        for result, image in zip(results, images, strict=True):
            pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(radius))
            assert result.dtype == torch.uint8
            assert np.array_equal(result.permute(1, 2, 0).numpy(), np.array(pillow))


def test_larger_radius_smooths_more_and_radius_0_changes_nothing(images: list[torch.Tensor]) -> None:
    blurred = gaussian_blur(images, (0, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(blurred[0], images, strict=True))
    spread = [float(blurred[radius][0].float().std()) for radius in (0, 1, 2)]
    assert spread[0] > 1.5 * spread[1] > 1.5 * spread[2]


def test_radius_is_standard_deviation_in_pixels() -> None:
    """A step becomes the cumulative distribution of a Gaussian: 84.1 % at one standard deviation from the edge."""
    step = torch.zeros(3, 4, 200, dtype=torch.uint8)
    step[..., 100:] = 255
    row = gaussian_blur([step], [8])[8][0][0, 0].double() / 255
    beside = (row[100 + 7] + row[100 + 8]) / 2  # pixel centers are half a pixel from the edge
    assert float(beside) == pytest.approx(0.841, abs=0.01)


def test_wrong_input_raises(images: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="at least 0 pixels"):
        gaussian_blur(images, [-1])
    with pytest.raises(ValueError, match="uint8"):
        gaussian_blur([images[0].float()], [1])
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        gaussian_blur([images[0][:1]], [1])
