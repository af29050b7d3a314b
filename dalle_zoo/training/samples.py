"""Images that show the progress of a run, with their prompts as titles."""

# B images, H W pixels

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from dalle_zoo.images import image_rows
from dalle_zoo.registry import Registry
from dalle_zoo.sheets import caption_sheet

SIDE = 128
"""Smaller images are enlarged to this side, pixels, so that their titles can be read."""
COLUMNS = 4
"""Titled images next to each other."""


class Samples(NamedTuple):
    """Images of a batch, such as originals and what the network made of them."""

    rows: tuple[Tensor, ...]
    """Pixels in [0, 1], (B, 3, H, W) each; the last are those that the network generated."""
    captions: Sequence[str] | None = None
    """B titles. Defaults to none."""

    @property
    def generated(self) -> Tensor:
        """What the network generated, (B, 3, H, W)."""
        return self.rows[-1]

    def sheet(self) -> Image.Image:
        """Returns one image: a grid with a line per row; with captions, each above its images."""
        if self.captions is None:
            return Image.fromarray(image_rows(*self.rows).permute(1, 2, 0).numpy())
        images = torch.stack([row.detach().float().cpu() for row in self.rows], dim=1).flatten(0, 1)
        scale = max(1, SIDE // images.shape[-1])
        columns = len(self.rows)
        return caption_sheet(images, list(self.captions), columns, scale, across=max(1, COLUMNS // columns))


class SampleScore(Protocol):
    """Scores images that a run generates for fixed prompts."""

    prompts: Sequence[str]
    """The prompts."""

    def __call__(self, images: Tensor) -> Mapping[str, float]:
        """Returns scores by name.

        Args:
            images: Pixels in [0, 1], (B, 3, H, W), one for each prompt.
        """


SAMPLE_SCORES: Registry[Callable[[int], SampleScore]] = Registry("score of samples", group="dalle_zoo.sample_scores")
"""Scores by name: functions of the maximum number of prompts. Those of the evaluation are entry points."""
