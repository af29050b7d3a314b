"""Attention, once, for every mask: the pattern is data, the back-end is a name.

``dense`` spells the formula out and is the oracle that every other back-end must equal; ``sdpa`` is PyTorch's
fused kernel. All of text and image shares one softmax, which the paper found better than normalising the
interactions apart (appendix B.1, footnote 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.masks import Mask
from dalle_zoo.registry import Registry

# B batch, L positions, H heads, D head size, d = H * D model width

Backend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]
"""Queries, keys, values (B, H, L, D) and a mask over L positions to mixed values (B, H, L, D)."""

BACKENDS: Registry[Backend] = Registry("attention back-end", group="dalle_zoo.attention_backends")


@BACKENDS.register("dense")
def dense(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """softmax(Q K^T / sqrt(D) + M) V with every score written out: the oracle."""
    length = query.shape[-2]
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    allowed = _allowed(mask, query.device)[:length, :length]
    weights = torch.softmax(scores.float().masked_fill(~allowed, -math.inf), dim=-1)
    return weights.to(value.dtype) @ value


@BACKENDS.register("sdpa")
def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """PyTorch's fused attention; plain causal masks take its causal path."""
    arguments = _sdpa_arguments(mask, query.device)
    length = query.shape[-2]
    if "attn_mask" in arguments:  # a prefix of the stream, such as the text alone, takes its corner
        arguments = {"attn_mask": arguments["attn_mask"][:length, :length]}
    return F.scaled_dot_product_attention(query, key, value, **arguments)


@BACKENDS.register("lines")
def lines(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Exact attention that touches only the keys of each line of image queries (rows or columns of the grid).

    Text and line keys share one softmax. A prefix of the stream, or a mask whose lines read nearly everything, takes
    `sdpa`.
    """
    text, plan = mask.layout.text, mask.line_plan()
    if query.shape[-2] != mask.layout.length or 2 * plan.allowed.numel() > mask.layout.image**2:
        return sdpa(query, key, value, mask)
    queries, keys, bias = _line_tensors(mask, query.device)
    text_out = sdpa(query[:, :, :text], key[:, :, :text], value[:, :, :text], mask)
    q = _take(query[:, :, text:], queries) / math.sqrt(query.shape[-1])  # (B, H, G, Q, D)
    k, v = _take(key[:, :, text:], keys), _take(value[:, :, text:], keys)  # (B, H, G, U, D)
    text_key, text_value = key[:, :, None, :text], value[:, :, None, :text]
    line_scores = (q @ k.transpose(-1, -2)).float() + bias
    scores = torch.cat([q @ text_key.transpose(-1, -2), line_scores], -1)
    weights = scores.softmax(-1).to(value.dtype)
    mixed = (weights[..., :text] @ text_value + weights[..., text:] @ v).flatten(2, 3)
    order = queries.flatten().argsort()  # back to raster order
    return torch.cat([text_out, mixed.index_select(2, order)], 2)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Positions of (B, H, N, D) by an index of shape (G, M): (B, H, G, M, D)."""
    return x.index_select(2, index.flatten()).view(*x.shape[:2], *index.shape, x.shape[-1])


# Kept tensors must serve training too, even where the first call comes from validation in inference mode.


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _allowed(mask: Mask, device: torch.device) -> Tensor:
    return mask.dense(device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _sdpa_arguments(mask: Mask, device: torch.device) -> dict[str, Any]:
    return mask.sdpa_arguments(device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _line_tensors(mask: Mask, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (G, Q), keys (G, U) and the additive mask (G, Q, U) of a line plan."""
    plan = mask.line_plan()
    bias = torch.zeros(plan.allowed.shape).masked_fill(~plan.allowed, -math.inf)
    # Copies, because the plan itself may have been made in inference mode.
    return plan.queries.clone().to(device), plan.keys.clone().to(device), bias.to(device)


class Attention(nn.Module):
    """Multi-head self-attention under a fixed mask.

    Reference: Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), appendix B.1.

    Args:
        width: Model width d.
        num_heads: Heads H; must divide the width.
        mask: Which positions read which.
        backend: Name in `BACKENDS`.
    """

    def __init__(self, width: int, num_heads: int, mask: Mask, backend: str = "sdpa") -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide width {width}: choose another of the two")
        self.num_heads = num_heads
        self.mask = mask
        self.backend = BACKENDS[backend]
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (B, L, d) to three times (B, H, L, D)."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        return query, key, value

    def merge(self, mixed: Tensor) -> Tensor:
        """Joins the heads and applies the output matrix: (B, H, L, D) to (B, L, d)."""
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Mixes a prefix of at most the mask's positions: (B, L, d) to (B, L, d)."""
        return self.merge(self.backend(*self.project(x), self.mask))
