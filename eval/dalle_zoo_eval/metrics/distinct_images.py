"""How many different images a model generates from one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_zoo_eval.metrics.base import METRICS
from dalle_zoo_eval.metrics.estimates import Estimate, bootstrapped

# B prompts, N images of a prompt

SAME = 0.06
"""Root mean square difference of thumbnails, of pixels in [0, 1], below which an image repeats an earlier one."""


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
    """Returns the mean number of different images among the candidates of a prompt, as ``value``.

    An image counts unless it is within `SAME` of one that counted before it.

    Args:
        thumbnails: uint8 (B, N, 3, h, w).
    """
    pixels = thumbnails.flatten(2).double() / 255
    apart = torch.cdist(pixels, pixels) / pixels.shape[-1] ** 0.5
    counted = torch.zeros(thumbnails.shape[:2], dtype=torch.bool)
    for n in range(thumbnails.shape[1]):
        counted[:, n] = ~((apart[:, n, :n] < SAME) & counted[:, :n]).any(1)
    return {"value": bootstrapped(counted.double().sum(1))}
