"""Image tokens of composed images, each taken from its layer alone: the same for a thing on every ground."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from tqdm import tqdm

from dalle_zoo.composition.colors import HUES
from dalle_zoo.composition.picker import is_held_out
from dalle_zoo.composition.scene import Placed, Scene, render
from dalle_zoo.composition.sprites import SIZE, SpriteSet
from dalle_zoo.models.tokenizer import ImageTokenizer

# B images, L layers of all of them, H W image, h w code grid, C colors, K codebook, S sprites

_REMEMBERED = 20_000
"""Number of layers whose tokens are kept."""
_AT_ONCE = 64
"""Number of images encoded at once."""


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
    on white, and a token that shows the ground is that of the ground alone. A recolored thing has the tokens of the
    thing in its own color, each exchanged for another one, the same for all things of that color.

    Args:
        tokenizer: Frozen image tokenizer. The tokens of layers are remembered, so that it encodes each only once.
    """

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[bytes, Tensor] = {}
        self._exchanged: Tensor | None = None

    def prepare(self, sprites: SpriteSet, device: torch.device) -> None:
        """Learns the tokens of other colors from sprites; only the first call does anything.

        Args:
            sprites: Those of the data. Things and combinations that are held out of training are not used.
            device: Device that encodes them.
        """
        if self._exchanged is None:
            self._exchanged = exchanged_tokens(self.tokenizer, sprites, device)

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Returns the image tokens of a batch with ``layers``, int64 (B, h, w).

        Args:
            batch: ``layers`` and ``recolored``, B tensors uint8 (L, 3, H, W) and int64 (L, 2) with the layers of each
                image, and ``cells``, int64 (B, h, w), as in `Layers`.

        Raises:
            ValueError: The batch has no layers, the tokenizer has another grid, or things are recolored and `prepare`
                was not called.
        """
        if "layers" not in batch or "cells" not in batch:
            raise ValueError("the batch has no layers, but data.init_args.layers is set: they come with composed data")
        cells: Tensor = batch["cells"]
        grid = batch["layers"][0].shape[-1] // self.tokenizer.factor
        if cells.shape[-1] != grid:
            raise ValueError(f"the batch has layers of {cells.shape[-1]} tokens in a row, the image tokenizer {grid}")
        counts = torch.tensor([len(own) for own in batch["layers"]], device=cells.device)
        first = (counts.cumsum(0) - counts) * cells[0].numel()  # token of each image's layers among those of all
        alone = self._of_layers(torch.cat(list(batch["layers"])))
        alone = self._exchange(alone, torch.cat(list(batch["recolored"]))).flatten()
        return alone[cells + first[:, None, None]]

    def _exchange(self, tokens: Tensor, recolored: Tensor) -> Tensor:
        """Exchanges the tokens of recolored layers; both int64, (L, h, w) and (L, 2)."""
        if self._exchanged is None:
            if (recolored >= 0).any():
                raise ValueError("the batch has things in other colors: call LayerTokens.prepare first")
            return tokens
        self._exchanged = self._exchanged.to(tokens.device)
        own, other = recolored[:, :, None, None].unbind(1)
        return self._exchanged[own, other, tokens]  # -1, not recolored, is the last row, which changes nothing

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


@torch.no_grad()
def exchanged_tokens(tokenizer: ImageTokenizer, sprites: SpriteSet, device: torch.device | None = None) -> Tensor:
    """Finds the token that most often takes the place of each token when a thing is recolored.

    Args:
        tokenizer: Image tokenizer.
        sprites: Sprites to encode in all colors, except for things and combinations held out of training.
        device: Device that encodes them. Defaults to the CPU.

    Returns:
        On the CPU, int64 (C + 1, C + 1, K): by the color of the thing, the color that replaces it, both as indices in
        `HUES`, and the token. A token that no thing of the color has stays, and so do all in the last row and column.
    """
    table = np.tile(np.arange(tokenizer.codebook_size), (len(HUES) + 1, len(HUES) + 1, 1))
    used = [i for i in sorted(sprites.single_hued) if sprites.sprites[i].split == "train"]
    owns = np.array([list(HUES).index(sprites.color(i)) for i in used], np.int64)
    tokens = _encoded(tokenizer, sprites, used, None, device)
    shown = not getattr(rank_zero_only, "rank", 0)
    for other, color in enumerate(tqdm(HUES, "tokens of other colors", unit="color", leave=False, disable=not shown)):
        seen = [n for n, i in enumerate(used) if not is_held_out("hue", sprites.sprites[i].thing, color)]
        found = _encoded(tokenizer, sprites, [used[n] for n in seen], color, device)
        own = np.broadcast_to(owns[seen, None], found.shape)
        triples, counts = np.unique(np.stack([own, tokens[seen], found]).reshape(3, -1), axis=1, return_counts=True)
        own, before, after = triples[:, np.argsort(counts, kind="stable")]
        table[own, other, before] = after  # the most frequent one last
    return torch.from_numpy(table)


def _encoded(
    tokenizer: ImageTokenizer, sprites: SpriteSet, used: list[int], color: str | None, device: torch.device | None
) -> npt.NDArray[np.int64]:
    """Tokens of sprites that fill the image, int64 (S, h w)."""
    scenes = (Scene(kind="hue", items=(Placed(sprite=i, color=color),)) for i in used)
    images = np.array([render(scene, sprites) for scene in scenes], np.uint8).reshape(-1, SIZE, SIZE, 3)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    parts = (pixels[first : first + _AT_ONCE] for first in range(0, max(1, len(used)), _AT_ONCE))
    tokens = [image_tokens(tokenizer, part.to(device).float() / 255) for part in parts]
    return torch.cat(tokens).flatten(1).cpu().numpy()
