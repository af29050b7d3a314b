"""Block-sparse attention of DALLE-pytorch's prior: positions read blocks of 16 that a layout in the file names.

```
            block of keys    0 1 2 3 4 5 6 7
block of queries   6         g g · · w w w ·         w  the window: blocks 4 to 7 read those of it before them
                   7         g g · r w w w w         g  the first blocks, which all read;  r  sampled at random
```
Within this a position reads itself and those before. An image cell need not read all text, so it is no `Mask`.

Its original ran on kernels of DeepSpeed (``SparseSelfAttention`` with ``VariableSparsityConfig``), written for Triton
1.0, which newer GPUs cannot run. Two of their ways are kept, for weights were trained with them: all layers use the
layout of the first one, because kernels are looked up by length alone; and padding of captions, which versions before
0.9 told them of, is not left out but has 1 added to its scores.

Reference: https://arxiv.org/abs/1904.10509; https://github.com/deepspeedai/DeepSpeed, deepspeed/ops/sparse_attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# B batch, P prompts, n candidates of each, T text positions, M positions that are there, H heads, D head size,
# C blocks of the complete sequence

BLOCK = 16
"""Positions of a block."""
WINDOW = 4
"""Blocks of a window."""
GLOBAL = 16
"""Blocks at the start that all read; the original counts 256 text tokens whatever their number is."""


def random_blocks(length: int) -> int:
    """Blocks that are sampled for every row of the layout, for a sequence of ``length`` positions."""
    return length // BLOCK // 4


def sure_blocks(length: int) -> Tensor:
    """Layout without what is sampled at random: 1 where a block of queries reads a block of keys, (C, C)."""
    query, key = torch.arange(length // BLOCK)[:, None], torch.arange(length // BLOCK)
    return ((query // WINDOW == key // WINDOW) | (key < GLOBAL)).tril().float()


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, readable: Tensor | None) -> Tensor:
    """Attention over the first M positions at once, (B, H, M, D) each.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        layout: 1 where a block of queries reads a block of keys, (C, C).
        readable: Which text positions are no padding, bool (B, T). Defaults to all.
    """
    length = query.shape[-2]
    allowed = layout.bool().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:length, :length].tril()
    bias = query.new_zeros(length, length).masked_fill(~allowed, -math.inf)
    if readable is not None:
        padding = F.pad((~readable).to(query), (0, length - readable.shape[1]))
        bias = bias + padding[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


class BlockCache:
    """Keys and values of one layer during generation: text once per prompt, all cells once per candidate.

    Args:
        layout: As of `attend_blocks`.
        text_key: Keys of the text, (P, H, T, D).
        text_value: Values, same shape.
        num_candidates: Candidates n of each prompt.
        readable: As of `attend_blocks`.
    """

    def __init__(
        self, layout: Tensor, text_key: Tensor, text_value: Tensor, num_candidates: int, readable: Tensor | None
    ) -> None:
        self.text_key, self.text_value = text_key, text_value
        prompts, heads, self.text_length, size = text_key.shape
        cells = len(layout) * BLOCK - self.text_length
        self.key = text_key.new_zeros(prompts, heads, num_candidates, cells, size)
        self.value = torch.zeros_like(self.key)
        rows = layout.bool().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[self.text_length :]
        self.bias = text_key.new_zeros(rows.shape).masked_fill(~rows, -math.inf)
        self.padding = None if readable is None else (~readable).to(text_key)[:, None, None]

    def attend(self, position: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stores keys and values of an image position, then mixes what it reads: (P, H, n, D) each."""
        self.key[..., position, :] = key
        self.value[..., position, :] = value
        seen = slice(position + 1)
        text_scores = query @ self.text_key.mT
        image_scores = (self.key[..., seen, :] @ query[..., None]).squeeze(-1)
        scores = torch.cat([text_scores, image_scores], -1) / math.sqrt(query.shape[-1])
        scores += self.bias[position, : scores.shape[-1]]
        if self.padding is not None:
            scores[..., : self.text_length] += self.padding
        of_text, of_image = scores.softmax(-1).tensor_split([self.text_length], -1)
        return of_text @ self.text_value + (of_image[..., None, :] @ self.value[..., seen, :]).squeeze(-2)
