"""Draws from the paper's prior, token by token.

```
text (P, T) ─► prefill once a prompt ─► text keys and values of every layer
                                             │ shared by the n candidates
SOI ─► step 0 ─► token ─► step 1 ─► token ─► … ─► step N-1 ─► codes (P, n, h, w)
```
`full forward == cached decode` for every registered mask is a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dalle_zoo.models.cache import LayerCache

if TYPE_CHECKING:
    from dalle_zoo.models.prior import Layer, Prior

# P prompts, n candidates of each, T text positions, d width, H heads, D head size, K codebook size


def read_text(layers: Sequence[Layer], x: Tensor, num_candidates: int) -> tuple[Tensor, list[LayerCache]]:
    """Runs the layers over the text positions.

    Args:
        layers: All of them.
        x: Inputs, (P, T, d).
        num_candidates: Candidates n of each prompt.

    Returns:
        Outputs (P, T, d), and a cache a layer that holds the keys and values of the text.
    """
    caches = []
    for layer in layers:
        attention = layer.attention
        query, key, value = attention.project(layer.attention_norm(x))
        caches.append(LayerCache(attention.mask, key, value, num_candidates))
        x = x + attention.merge(attention.backend(query, key, value, attention.mask))
        x = x + layer.mlp(layer.mlp_norm(x))
    return x, caches


def read_token(layers: Sequence[Layer], caches: Sequence[LayerCache], index: int, x: Tensor) -> Tensor:
    """Runs the layers over image position ``index`` of every candidate: (P, n, d) to (P, n, d)."""
    for layer, cache in zip(layers, caches, strict=True):
        # Candidates stand where the positions of a sequence usually do: (P, n, d) → (P, H, n, D).
        query, key, value = layer.attention.project(layer.attention_norm(x))
        x = x + layer.attention.merge(cache.attend(index, query, key, value))
        x = x + layer.mlp(layer.mlp_norm(x))
    return x


class PriorDecoding:
    """Decoding state of P prompts with n candidates each.

    Args:
        prior: The prior; its device and dtype are used.
        text: Text ids with padding ids, int64 (P, T).
        num_candidates: Candidates n of each prompt.
    """

    def __init__(self, prior: Prior, text: Tensor, num_candidates: int) -> None:
        self.prior = prior
        self.shape = (len(text), num_candidates)
        self.positions = prior.image_positions()
        _, self.caches = read_text(prior.layers, prior.embed_text(text), num_candidates)

    def step(self, index: int, previous: Tensor | None) -> Tensor:
        """Logits of image token ``index``: (P, n) tokens before it, None at 0, to (P, n, K)."""
        prior = self.prior
        start = prior.start_of_image.expand(*self.shape, -1)
        x = (start if previous is None else prior.image_embedding(previous)) + self.positions[index]
        x = read_token(prior.layers, self.caches, index, x)
        logits: Tensor = prior.image_head(prior.final_norm(x))
        return logits
