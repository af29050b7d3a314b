"""Block-sparse attention of DALLE-pytorch's prior, in blocks of 16 positions given by a stored layout.

```
            block of keys    0 1 2 3 4 5 6 7
block of queries   6         g g · · w w w ·         w  window: blocks 4 to 7 attend to earlier blocks of it
                   7         g g · r w w w w         g  global blocks at the start;  r  sampled at random
```
Within these blocks attention is causal. Image cells may not attend to all text, so this is not a `Mask`.

The original used kernels of DeepSpeed (``SparseSelfAttention`` with ``VariableSparsityConfig``) for Triton 1.0, which
newer GPUs cannot run. Two of their peculiarities are reproduced, because weights were trained with them:

- All layers use the layout of the first one, because the kernels are cached by sequence length only.
- Versions before 0.9 pass a padding mask, but the kernels do not exclude padding: they add 1 to its scores.

Reference: https://arxiv.org/abs/1904.10509; https://github.com/deepspeedai/DeepSpeed, deepspeed/ops/sparse_attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# B batch, P prompts, n candidates of each, T text positions, M positions of the input, H heads, D head size,
# C blocks of the complete sequence

BLOCK = 16
"""Positions of a block."""
WINDOW = 4
"""Blocks of a window."""
GLOBAL = 16
"""Blocks at the start that all positions attend to: the original assumes 256 text tokens, whatever their number."""


def random_blocks(length: int) -> int:
    """Number of random blocks in every row of the layout, for a sequence of ``length`` positions."""
    return length // BLOCK // 4


def fixed_blocks(length: int) -> Tensor:
    """Layout without random blocks: 1 where a block of queries attends to a block of keys, (C, C)."""
    query, key = torch.arange(length // BLOCK)[:, None], torch.arange(length // BLOCK)
    return ((query // WINDOW == key // WINDOW) | (key < GLOBAL)).tril().float()


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, text_mask: Tensor | None) -> Tensor:
    """Attends within the first M positions: (B, H, M, D) each to (B, H, M, D).

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        layout: 1 where a block of queries attends to a block of keys, (C, C).
        text_mask: False at padding, bool (B, T); None if there is no padding mask.
    """
    length = query.shape[-2]
    allowed = layout.bool().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:length, :length].tril()
    bias = query.new_zeros(length, length).masked_fill(~allowed, -math.inf)
    if text_mask is not None:
        padding = F.pad((~text_mask).to(query), (0, length - text_mask.shape[1]))
        bias = bias + padding[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


class BlockCache:
    """Key-value cache of one layer: text once per prompt, all image cells once per candidate.

    Args:
        layout: As for `attend_blocks`.
        text_key: Keys of the text, (P, H, T, D).
        text_value: Values of the text, same shape.
        num_candidates: Candidates n of each prompt.
        text_mask: As for `attend_blocks`.
    """

    def __init__(
        self, layout: Tensor, text_key: Tensor, text_value: Tensor, num_candidates: int, text_mask: Tensor | None
    ) -> None:
        self.text_key, self.text_value = text_key, text_value
        prompts, heads, self.text_length, size = text_key.shape
        cells = len(layout) * BLOCK - self.text_length
        self.key = text_key.new_zeros(prompts, heads, num_candidates, cells, size)
        self.value = torch.zeros_like(self.key)
        rows = layout.bool().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[self.text_length :]
        self.bias = text_key.new_zeros(rows.shape).masked_fill(~rows, -math.inf)
        self.padding = None if text_mask is None else (~text_mask).to(text_key)[:, None, None]

    def attend(self, position: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Caches keys and values of an image position and attends: (P, H, n, D) each to (P, H, n, D)."""
        self.key[..., position, :] = key
        self.value[..., position, :] = value
        past = slice(position + 1)
        text_scores = query @ self.text_key.mT
        image_scores = (self.key[..., past, :] @ query[..., None]).squeeze(-1)
        scores = torch.cat([text_scores, image_scores], -1) / math.sqrt(query.shape[-1])
        scores += self.bias[position, : scores.shape[-1]]
        if self.padding is not None:
            scores[..., : self.text_length] += self.padding
        of_text, of_image = scores.softmax(-1).tensor_split([self.text_length], -1)
        return of_text @ self.text_value + (of_image[..., None, :] @ self.value[..., past, :]).squeeze(-2)
