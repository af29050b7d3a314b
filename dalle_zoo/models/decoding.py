"""Cached decoding of the paper's prior, token by token.

```
text (P, T) ─► prefill once per prompt ─► text keys and values of every layer
                                             │ shared by the n candidates
SOI ─► step 0 ─► token ─► step 1 ─► token ─► … ─► step N-1 ─► codes (P, n, h, w)
```
A test checks for every registered mask that cached decoding gives the logits of the full forward pass.

This file depends on layers and priors only through the protocols `DecodableLayer` and `DecodablePrior`, because
`prior.py` imports this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dalle_zoo.models.attention import Attention
from dalle_zoo.models.cache import LayerCache

# P prompts, n candidates of each, T text positions, W positions of a window, d width, H heads, D head size,
# K codebook size


class DecodableLayer(Protocol):
    """The parts of a pre-LN layer that cached decoding calls."""

    @property
    def attention_norm(self) -> Callable[[Tensor], Tensor]:
        """Norm before the attention."""

    @property
    def attention(self) -> Attention:
        """Attention with its mask and back-end."""

    @property
    def mlp_norm(self) -> Callable[[Tensor], Tensor]:
        """Norm before the MLP."""

    @property
    def mlp(self) -> Callable[[Tensor], Tensor]:
        """MLP."""


class DecodablePrior(Protocol):
    """The parts of a prior with a start-of-image token that `PriorDecoding` calls."""

    @property
    def layers(self) -> Sequence[DecodableLayer]:
        """Layers, first to last."""

    @property
    def start_of_image(self) -> Tensor:
        """Input of the first image position, (d,)."""

    @property
    def image_embedding(self) -> Callable[[Tensor], Tensor]:
        """Image tokens (…) to vectors (…, d)."""

    @property
    def final_norm(self) -> Callable[[Tensor], Tensor]:
        """Norm after the last layer."""

    @property
    def image_head(self) -> Callable[[Tensor], Tensor]:
        """Hidden states (…, d) to logits (…, K)."""

    def embed_text(self, text: Tensor) -> Tensor:
        """Inputs of the text positions: ids (P, T) to (P, T, d)."""

    def image_positions(self) -> Tensor:
        """Position embedding of every cell in raster order, (N, d)."""


def prefill(
    layers: Sequence[DecodableLayer], x: Tensor, num_candidates: int, window: int = 1
) -> tuple[Tensor, list[LayerCache]]:
    """Runs the layers over the text positions and fills a cache per layer.

    Args:
        layers: All layers of the prior.
        x: Inputs, (P, T, d).
        num_candidates: Candidates n of each prompt.
        window: Largest number W of image positions that one call of `decode_positions` will run. Defaults to 1.

    Returns:
        Outputs (P, T, d), and one cache per layer with the keys and values of the text.
    """
    caches = []
    for layer in layers:
        attention = layer.attention
        query, key, value = attention.project(layer.attention_norm(x))
        caches.append(LayerCache(attention.mask, key, value, num_candidates, window=window))
        x = x + attention.merge(attention.backend(query, key, value, attention.mask))
        x = x + layer.mlp(layer.mlp_norm(x))
    return x, caches


def decode_positions(
    layers: Sequence[DecodableLayer], caches: Sequence[LayerCache], index: int | Tensor, x: Tensor
) -> Tensor:
    """Runs the layers over image positions ``index`` … ``index + W - 1`` of every candidate.

    Args:
        layers: All layers of the prior.
        caches: Caches returned by `prefill`; keys and values of the positions are added.
        index: The first position, as for `StepSlots.at`.
        x: Inputs, (P, n * W, d).

    Returns:
        Outputs, (P, n * W, d).
    """
    count = x.shape[1] // caches[0].num_candidates
    slots = {at: at.at(index, count) for at in {cache.slots for cache in caches}}  # once per mask, not per layer
    for layer, cache in zip(layers, caches, strict=True):
        # Candidates take the place of the positions of a sequence: (P, n W, d) → (P, H, n W, D).
        query, key, value = layer.attention.project(layer.attention_norm(x))
        x = x + layer.attention.merge(cache.attend(slots[cache.slots], query, key, value))
        x = x + layer.mlp(layer.mlp_norm(x))
    return x


class PriorDecoding:
    """Decoding state of P prompts with n candidates each.

    Args:
        prior: The prior; its device and dtype are used.
        text: Text ids with padding ids, int64 (P, T).
        num_candidates: Candidates n of each prompt.
        window: Largest number of positions that one call of `window` will run. Defaults to 1.
    """

    on_device = True
    """`step` accepts its index as a tensor on the device, so a CUDA graph can replay it."""

    def __init__(self, prior: DecodablePrior, text: Tensor, num_candidates: int, window: int = 1) -> None:
        self.prior = prior
        self.shape = (len(text), num_candidates)
        self.positions = prior.image_positions()
        _, self.caches = prefill(prior.layers, prior.embed_text(text), num_candidates, window)

    def step(self, index: int | Tensor, previous: Tensor | None) -> Tensor:
        """Logits of image token ``index``.

        Args:
            index: 0 … N - 1, or from the second step on int64 (1,) on the device.
            previous: The token before it, int64 (P, n); None at 0.

        Returns:
            (P, n, K).
        """
        prior = self.prior
        start = prior.start_of_image.expand(*self.shape, -1)
        position = self.positions[index] if isinstance(index, int) else self.positions.index_select(0, index)
        x = (start if previous is None else prior.image_embedding(previous)) + position
        return self._logits(index, x)

    def window(self, index: int, previous: Tensor) -> Tensor:
        """Logits of image tokens ``index`` … ``index + W - 1`` in one pass, from guesses of the tokens between.

        Keys and values of the window are stored. If a guess was wrong, the next window begins at or before the first
        position that attended to it, and overwrites its keys and values; the cache retains the slots needed for that.

        Args:
            index: The first token; all tokens before it have been run with their final values.
            previous: The token before each position, int64 (P, n, W); the first is ignored if ``index`` is 0.

        Returns:
            (P, n, W, K).
        """
        prior, count = self.prior, previous.shape[2]
        x = prior.image_embedding(previous)
        if index == 0:
            start = prior.start_of_image.expand(*self.shape, 1, -1)
            x = torch.cat([start, x[:, :, 1:]], 2)
        x = x + self.positions[index : index + count]
        return self._logits(index, x.flatten(1, 2)).view(*previous.shape, -1)

    def _logits(self, index: int | Tensor, x: Tensor) -> Tensor:
        prior = self.prior
        logits: Tensor = prior.image_head(prior.final_norm(decode_positions(prior.layers, self.caches, index, x)))
        return logits
