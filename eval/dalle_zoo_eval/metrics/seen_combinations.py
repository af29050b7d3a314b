"""Memorization of composed training data: how often an image shows a combination that training contains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_zoo.composition import COMBINATIONS
from dalle_zoo_eval.metrics.base import METRICS
from dalle_zoo_eval.metrics.estimates import Estimate, bootstrapped

# B prompts, N images of a prompt


@METRICS.register(
    "seen_combinations",
    extractor="sprites",
    lower_is_better=True,
    label="images that show a combination of training",
    unit="%",
    format=".1f",
    section="Memorization",
    images=("real", "reconstructed", "candidates"),
    paired=True,
    every=True,
    by_group=True,
    interval="bootstrap over the prompts",
)
def seen_combinations(novel: Tensor, targets: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """Returns the share of images that show a combination of the training data, as ``value``.

    Training data contain every combination of thing, hue, number, order and ground that is not held out. An image that
    shows no held-out combination therefore has a training image with the same content. For prompts of held-out
    combinations, the score is the share of images in which the model fell back on a combination of its training data;
    the score of real images is the minimum.

    Args:
        novel: Whether the ground, hue, number and order that an image shows are held out, bool (B, N, 4).
        targets: One dict per prompt with the ``kind`` of combination.

    Example:
        >>> novel = torch.zeros(1, 2, 4, dtype=torch.bool)  # two images of a prompt
        >>> novel[0, 0, COMBINATIONS.index("hue")] = True
        >>> seen_combinations(novel, [{"kind": "hue"}])["value"].value
        0.5
    """
    kinds = torch.tensor([COMBINATIONS.index(target["kind"]) for target in targets])
    seen = ~novel[torch.arange(len(kinds)), :, kinds]
    return {"value": bootstrapped(seen.double().mean(1))}
