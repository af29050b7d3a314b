"""Layers of DALLE-pytorch's prior: rotary attention, gated MLP, token shift, LayerScale."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.masks import Mask, TextImageLayout

# B batch, P prompts, n candidates of each, T text positions of the layout, N image positions, L = T + N, d width,
# H heads, D head size, R rotated dimensions of a head

FAR_FROM_TEXT = 8192
"""Text position of all image cells, as in the original."""
FAR_FROM_IMAGE = -10.0
"""Row and column of all text positions, as in the original; those of image cells are in [-1, 1]."""


# ------------------------------------------------------------ rotary positions


def rotary_size(head_size: int) -> int:
    """Number of rotated dimensions R of a head: three parts of equal, even size, for text position, row and column."""
    return 3 * 2 * (head_size // 3 // 2)


def rotary_table(layout: TextImageLayout, head_size: int) -> Tensor:
    """Rotary position embeddings: cosine and sine of the angle of every position and dimension, (2, L, R).

    The first third of the R dimensions encodes the text position, with the frequencies of language models. The other
    two thirds encode row and column, with frequencies from pi to 5 pi.
    """
    size = head_size // 3
    frequencies = 10000 ** (-2 * torch.arange(size // 2) / max(size, 1))  # (R / 6,)
    pixel = torch.linspace(1, 5, size // 2) * math.pi
    cells = torch.cartesian_prod(torch.linspace(-1, 1, layout.height), torch.linspace(-1, 1, layout.width))
    words = torch.arange(layout.text, dtype=torch.float32)
    position = torch.cat([words, torch.full((layout.image,), float(FAR_FROM_TEXT))])
    row, column = torch.cat([torch.full((layout.text, 2), FAR_FROM_IMAGE), cells]).unbind(1)
    angles = torch.cat([torch.outer(position, frequencies), torch.outer(row, pixel), torch.outer(column, pixel)], 1)
    return cos_sin(angles.repeat_interleave(2, 1))


def cos_sin(angles: Tensor) -> Tensor:
    """Cosines and sines of angles in radians, (L, R) to (2, L, R)."""
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates adjacent pairs of the first R dimensions: (..., L, D) by (2, L, R), or (..., D) by (2, R)."""
    cosine, sine = rotation
    pairs, rest = x[..., : cosine.shape[-1]], x[..., cosine.shape[-1] :]
    quarter_turn = torch.stack([-pairs[..., 1::2], pairs[..., 0::2]], -1).flatten(-2)
    return torch.cat([pairs * cosine + quarter_turn * sine, rest], -1)


# ------------------------------------------------------------ token shift


def shift_tokens(x: Tensor, layout: TextImageLayout) -> Tensor:
    """Replaces channels of every position by those of earlier positions.

    The first half of the channels of a text position comes from the position before. The first quarter of the channels
    of an image cell comes from the cell above, the second quarter from the cell to the left. Channels from outside the
    text or the grid are 0.

    Args:
        x: The first M >= T positions of the layout, (B, M, d).
        layout: Positions of text and image.
    """
    text, half, quarter = layout.text, *_parts(x.shape[-1])
    words, cells = x[:, :text], x[:, text:]
    before = F.pad(words[:, :-1, :half], (0, 0, 1, 0))
    length = cells.shape[1]
    above = F.pad(cells[..., :quarter], (0, 0, layout.width, 0))[:, :length]
    left = F.pad(cells[..., quarter : 2 * quarter], (0, 0, 1, 0))[:, :length]
    at_border = torch.arange(length, device=x.device) % layout.width == 0
    left = left.masked_fill(at_border[:, None], 0)
    words = torch.cat([before, words[..., half:]], -1)
    cells = torch.cat([above, left, cells[..., 2 * quarter :]], -1)
    return torch.cat([words, cells], 1)


def _parts(width: int) -> tuple[int, int]:
    """Channels of a half and of a quarter, rounded up."""
    return -(-width // 2), -(-width // 4)


class ShiftCache:
    """Computes `shift_tokens` for one image cell at a time; caches the channels of the last row of cells.

    Args:
        layout: Positions of text and image.
    """

    def __init__(self, layout: TextImageLayout) -> None:
        self.width = layout.width
        self.cached: Tensor | None = None

    def shift(self, index: int, x: Tensor) -> Tensor:
        """Shifts image position ``index`` of every candidate; must be called in order. Keeps the shape (P, n, d)."""
        quarter = _parts(x.shape[-1])[1]
        if self.cached is None:
            self.cached = x.new_zeros(self.width, *x.shape[:2], 2 * quarter)
        column = index % self.width
        above = self.cached[column, ..., :quarter]
        left = self.cached[column - 1, ..., quarter:]
        out = torch.cat([above, left if column else torch.zeros_like(left), x[..., 2 * quarter :]], -1)
        self.cached[column] = x[..., : 2 * quarter]
        return out


# ------------------------------------------------------------ branches


def attend_unpadded(query: Tensor, key: Tensor, value: Tensor, mask: Mask, text_mask: Tensor) -> Tensor:
    """Attention with a padding mask: (B, H, M, D) each and bool (B, T + 1) to (B, H, M, D).

    As in the original, the padding mask applies to all queries under a `full` mask, and only to image queries under
    other masks.
    """
    length, text = query.shape[-2], text_mask.shape[1]
    allowed = mask.dense(query.device)[None, :length, :length].repeat(len(query), 1, 1)
    allowed[:, 0 if mask.spec == "full" else text :, :text] &= text_mask[:, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None])


class Attention(nn.Module):
    """Projections of multi-head attention; queries, keys and, unlike in RoPE, values are rotated.

    Args:
        width: Model width d.
        num_heads: Heads H.
        head_size: Head size D; H * D need not be d.
    """

    def __init__(self, width: int, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * num_heads * head_size, bias=False)
        self.output = nn.Linear(num_heads * head_size, width)

    def project(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (B, L, d) to three times (B, H, L, D)."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = (heads if rotation is None else rotate(heads, rotation)).unbind(0)
        return query, key, value

    def merge(self, mixed: Tensor) -> Tensor:
        """Joins the heads and applies the output matrix: (B, H, L, D) to (B, L, d)."""
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out


class GatedMLP(nn.Module):
    """GEGLU with a hidden width of 4 d and an exact GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, 8 * width)
        self.output = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) to (…, d)."""
        value, gate = self.hidden(x).chunk(2, -1)
        out: Tensor = self.output(value * F.gelu(gate))
        return out


def make_norm(norm: str, width: int) -> nn.Module:
    """Returns a LayerNorm for ``layer``, an RMSNorm for ``rms``."""
    # The original clamps the root mean square to at least 1e-8.
    return nn.LayerNorm(width) if norm == "layer" else nn.RMSNorm(width, eps=1e-16)


class Branch(nn.Module):
    """Norms and LayerScale of a residual branch.

    Args:
        width: Model width d.
        norm: Type of the norms, as for `make_norm`.
        norm_behind: Whether the output is normalized too (sandwich norm).
        scale: Initial value of the learned scale of every channel (LayerScale); None to omit it.
    """

    def __init__(self, width: int, *, norm: str, norm_behind: bool, scale: float | None) -> None:
        super().__init__()
        self.norm = make_norm(norm, width)
        self.norm_behind = make_norm(norm, width) if norm_behind else nn.Identity()
        self.scale = None if scale is None else nn.Parameter(torch.full((width,), scale))

    def postprocess(self, x: Tensor) -> Tensor:
        """Normalizes and scales the output of attention or MLP for the residual stream: (…, d) to (…, d)."""
        x = self.norm_behind(x)
        return x if self.scale is None else x * self.scale
