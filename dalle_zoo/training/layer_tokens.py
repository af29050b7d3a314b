"""Image tokens of composed images, each taken from its layer alone: the same for a thing on every ground."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dalle_zoo.models.tokenizer import ImageTokenizer

# B images, L layers of all of them, H W image, h w code grid

_REMEMBERED = 20_000
"""Number of layers whose tokens are kept."""


@torch.no_grad()
def image_tokens(tokenizer: ImageTokenizer, images: Tensor) -> Tensor:
    """Tokens of pixels in [0, 1], in float32 with any precision of the trainer: the same as in code shards.

    Args:
        tokenizer: Frozen image tokenizer; it is moved to the device of the images.
        images: (B, 3, H, W).

    Returns:
        int64 (B, h, w).
    """
    with torch.autocast(images.device.type, enabled=False):
        return tokenizer.to(images.device).encode(images.float())


class LayerTokens:
    """Tokenizes the layers of composed images instead of the images.

    A convolutional encoder gives a thing other tokens on every ground and next to every other thing, and each of
    these combinations would have to be learned. Here a token that shows a part of a thing is that of the thing alone
    on white, and a token that shows the ground is that of the ground alone.

    Args:
        tokenizer: Frozen image tokenizer. The tokens of layers are remembered, so that it encodes each only once.
    """

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Returns the image tokens of a batch with ``layers``, int64 (B, h, w).

        Args:
            batch: ``layers``, B tensors uint8 (L, 3, H, W) with the layers of each image; ``cells``, int64 (B, h, w),
                as in `Layers.cells`.

        Raises:
            ValueError: The batch has no layers, or the tokenizer has another grid.
        """
        if "layers" not in batch or "cells" not in batch:
            raise ValueError("the batch has no layers, but data.init_args.layers is set: they come with composed data")
        cells: Tensor = batch["cells"]
        grid = batch["layers"][0].shape[-1] // self.tokenizer.factor
        if cells.shape[-1] != grid:
            raise ValueError(f"the batch has layers of {cells.shape[-1]} tokens in a row, the image tokenizer {grid}")
        counts = torch.tensor([len(own) for own in batch["layers"]], device=cells.device)
        first = (counts.cumsum(0) - counts) * cells[0].numel()  # token of each image's layers among those of all
        alone = self._of_layers(torch.cat(list(batch["layers"]))).flatten()
        return alone[cells + first[:, None, None]]

    def _of_layers(self, layers: Tensor) -> Tensor:
        """Tokens of layers, int64 (L, h, w)."""
        if layers.device.type != "cpu":  # encoding is faster there than comparing
            return image_tokens(self.tokenizer, layers.float() / 255)
        keys = [hashlib.blake2b(layer.numpy().tobytes(), digest_size=16).digest() for layer in layers]
        if len(self._known) + len(keys) > _REMEMBERED:
            self._known.clear()
        new = list({key: i for i, key in enumerate(keys) if key not in self._known}.values())
        if new:
            found = image_tokens(self.tokenizer, layers[new].float() / 255)
            self._known |= {keys[i]: tokens.clone() for i, tokens in zip(new, found, strict=True)}
        return torch.stack([self._known[key] for key in keys])
