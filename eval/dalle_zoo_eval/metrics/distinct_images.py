"""Number of distinct images that a model generates from one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_zoo_eval.metrics.base import METRICS
from dalle_zoo_eval.metrics.estimates import Estimate, bootstrapped

# B prompts, N images of a prompt

SAME = 0.06
"""Root mean square difference of thumbnails, pixels in [0, 1], below which two images are the same."""


@METRICS.register(
    "distinct_images",
    extractor="sprites",
    label="distinct images of a prompt",
    format=".1f",
    section="Distinct images",
    images=("candidates",),
    every=True,
    interval="bootstrap over the prompts",
)
def distinct_images(thumbnails: Tensor) -> dict[str, Estimate]:
    """Returns the mean number of distinct images among the candidates of a prompt, as ``value``.

    An image is distinct unless it is the same, by `SAME`, as an earlier distinct one.

    Args:
        thumbnails: Thumbnails of all candidates, uint8 (B, N, 3, h, w).

    Example:
        >>> black, white = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 255, dtype=torch.uint8)
        >>> distinct_images(torch.stack([black, white, black])[None])["value"].value
        2.0
    """
    pixels = thumbnails.flatten(2).double() / 255
    apart = torch.cdist(pixels, pixels) / pixels.shape[-1] ** 0.5
    counted = torch.zeros(thumbnails.shape[:2], dtype=torch.bool)
    for n in range(thumbnails.shape[1]):
        counted[:, n] = ~((apart[:, n, :n] < SAME) & counted[:, :n]).any(1)
    return {"value": bootstrapped(counted.double().sum(1))}
