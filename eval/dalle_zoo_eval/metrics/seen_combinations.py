"""Memorization of a composed data set: how often an image shows a combination that training composes."""

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
    """Returns the share of images whose nearest training composite has the same thing, place and ground, as ``value``.

    Training composes every thing in every place, except the combinations that it holds out. So the nearest training
    composite of an image has what the image shows (the nearest sprite, in its hue, number or order, on its ground),
    unless that combination is held out. Of prompts for held-out combinations, this is the share of images for which
    the model fell back on a combination that it was trained on; real images are the floor.

    Args:
        novel: Whether the ground, hue, number and order that an image shows are held out, bool (B, N, 4).
        targets: One dict per prompt with the ``kind`` of combination.
    """
    kinds = torch.tensor([COMBINATIONS.index(target["kind"]) for target in targets])
    seen = ~novel[torch.arange(len(kinds)), :, kinds]
    return {"value": bootstrapped(seen.double().mean(1))}
