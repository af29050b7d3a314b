"""Samples from the paper's prior, token by token.

```
text (P, T) ─► prefill once per prompt ─► text keys and values of every layer
                                             │ shared by the n candidates
SOI ─► step 0 ─► token ─► step 1 ─► token ─► … ─► step N-1 ─► codes (P, n, h, w)
```
`full forward == cached decode` for every registered mask is a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dalle_zoo.models.cache import LayerCache

if TYPE_CHECKING:
    from dalle_zoo.models.prior import Layer, Prior

# P prompts, n candidates of each, T text positions, W positions of a window, d width, H heads, D head size,
# K codebook size


def read_text(
    layers: Sequence[Layer], x: Tensor, num_candidates: int, window: int = 1
) -> tuple[Tensor, list[LayerCache]]:
    """Runs the layers over the text positions.

    Args:
        layers: All of them.
        x: Inputs, (P, T, d).
        num_candidates: Candidates n of each prompt.
        window: Most image positions W that `read_token` will run at once.

    Returns:
        Outputs (P, T, d), and a cache a layer that holds the keys and values of the text.
    """
    caches = []
    for layer in layers:
        attention = layer.attention
        query, key, value = attention.project(layer.attention_norm(x))
        caches.append(LayerCache(attention.mask, key, value, num_candidates, window=window))
        x = x + attention.merge(attention.backend(query, key, value, attention.mask))
        x = x + layer.mlp(layer.mlp_norm(x))
    return x, caches


def read_token(layers: Sequence[Layer], caches: Sequence[LayerCache], index: int | Tensor, x: Tensor) -> Tensor:
    """Runs the layers over image positions ``index`` … ``index + W - 1`` of every candidate.

    Args:
        layers: All of them.
        caches: As of `read_text`.
        index: The first position, as for `Places.at`.
        x: Inputs, (P, n * W, d).

    Returns:
        The same shape.
    """
    count = x.shape[1] // caches[0].num_candidates
    places = {at: at.at(index, count) for at in {cache.places for cache in caches}}  # once a mask, not once per layer
    for layer, cache in zip(layers, caches, strict=True):
        # Candidates stand where the positions of a sequence usually do: (P, n W, d) → (P, H, n W, D).
        query, key, value = layer.attention.project(layer.attention_norm(x))
        x = x + layer.attention.merge(cache.attend(places[cache.places], query, key, value))
        x = x + layer.mlp(layer.mlp_norm(x))
    return x


class PriorDecoding:
    """Decoding state of P prompts with n candidates each.

    Args:
        prior: The prior; its device and dtype are used.
        text: Text ids with padding ids, int64 (P, T).
        num_candidates: Candidates n of each prompt.
        window: Most positions that `window` will run at once.
    """

    on_device = True
    """A step takes its number as a tensor as well, so a CUDA graph can repeat it."""

    def __init__(self, prior: Prior, text: Tensor, num_candidates: int, window: int = 1) -> None:
        self.prior = prior
        self.shape = (len(text), num_candidates)
        self.positions = prior.image_positions()
        _, self.caches = read_text(prior.layers, prior.embed_text(text), num_candidates, window)

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
        """Logits of image tokens ``index`` … ``index + W - 1`` in one pass, from guesses of those between.

        Keys and values of the window are stored. Where a guess turns out wrong, the next window begins at or before
        the first position that has read it, and overwrites them; the cache keeps what that needs.

        Args:
            index: The first token; all before it were run with their final tokens.
            previous: The token before each, int64 (P, n, W); the first is not looked at where ``index`` is 0.

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
        logits: Tensor = prior.image_head(prior.final_norm(read_token(prior.layers, self.caches, index, x)))
        return logits
