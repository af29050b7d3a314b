"""Scores of images that a run generates while it trains: see ``samples.score`` in docs/training.md."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_zoo.composition.sprites import bundled_folder
from dalle_zoo_eval.datasets.composition import read_composition
from dalle_zoo_eval.extractors.sprites import load_sprites
from dalle_zoo_eval.metrics.composition import composition

SPLIT = "plain"
MEASURED = ("grounds", "hues", "layout", "boxes", "things", "shapes", "styles")
"""What `composition` takes of the measurements."""


class CompositionScore:
    """The plain part of the protocol ``composition``, by pixels: whether an image shows the thing of its prompt.

    Args:
        count: Number of prompts, from the first of the protocol on; there are a hundred.
    """

    def __init__(self, count: int) -> None:
        sprites = bundled_folder()
        items = read_composition(sprites, SPLIT).items[:count]
        self.prompts = tuple(item.captions[0] for item in items)
        self._targets = [item.targets for item in items]
        self._sprites = load_sprites(sprites, torch.device("cpu"))

    def __call__(self, images: Tensor) -> dict[str, float]:
        """Returns the share of images with the right thing.

        Args:
            images: Pixels in [0, 1], (B, 3, H, W), one for each prompt.
        """
        found = self._sprites((images.float().cpu() * 255).round().to(torch.uint8))
        (right, *_) = composition(*(found[name][:, None] for name in MEASURED), self._targets)["thing"]
        return {"thing": right}
