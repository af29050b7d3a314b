"""Layers of DALLE-pytorch's prior: attention with rotations, gated MLP, shifted tokens, scaled branches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.masks import Mask, TextImageLayout

# B batch, P prompts, n candidates of each, T text positions of the layout, N image positions, L = T + N, d width,
# H heads, D head size, R rotated dimensions of a head

FAR_FROM_TEXT = 8192
"""Text position that the original gives to all cells of the image."""
FAR_FROM_IMAGE = -10.0
"""Row and column that it gives to all text, where those of the image lie in [-1, 1]."""


# ------------------------------------------------------------ rotary positions


def rotated_size(head_size: int) -> int:
    """Dimensions R of a head that are rotated: three equal and even parts, for text position, row and column."""
    return 3 * 2 * (head_size // 3 // 2)


def rotations(layout: TextImageLayout, head_size: int) -> Tensor:
    """Cosines and sines of the angle of every position and dimension, (2, L, R).

    The first third of the R dimensions turns with the text position, by the frequencies of language models; the
    other two with row and column, by frequencies pi to 5 pi.
    """
    size = head_size // 3
    ladder = 10000 ** (-2 * torch.arange(size // 2) / max(size, 1))  # (R / 6,)
    pixel = torch.linspace(1, 5, size // 2) * math.pi
    cells = torch.cartesian_prod(torch.linspace(-1, 1, layout.height), torch.linspace(-1, 1, layout.width))
    words = torch.arange(layout.text, dtype=torch.float32)
    position = torch.cat([words, torch.full((layout.image,), float(FAR_FROM_TEXT))])
    row, column = torch.cat([torch.full((layout.text, 2), FAR_FROM_IMAGE), cells]).unbind(1)
    angles = torch.cat([torch.outer(position, ladder), torch.outer(row, pixel), torch.outer(column, pixel)], 1)
    return turns(angles.repeat_interleave(2, 1))


def turns(angles: Tensor) -> Tensor:
    """Cosines and sines of angles in radians, (L, R) to (2, L, R)."""
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns neighboring pairs of the first R dimensions: (..., L, D) by (2, L, R), or (..., D) by (2, R)."""
    cosine, sine = rotation
    turned, rest = x[..., : cosine.shape[-1]], x[..., cosine.shape[-1] :]
    quarter_turn = torch.stack([-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
    return torch.cat([turned * cosine + quarter_turn * sine, rest], -1)


# ------------------------------------------------------------ shifted tokens


def shift_tokens(x: Tensor, layout: TextImageLayout) -> Tensor:
    """Replaces channels of every position by those of positions before it.

    Of a text position the first half comes from the one before; of a cell the first quarter from the cell above, the
    second from the cell to the left. What would come from outside the text or the grid is 0.

    Args:
        x: (B, M, d), the first M >= T positions of the layout.
        layout: Where text and image stand.
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
    """Twin of `shift_tokens` for one cell after the other; keeps the channels of as many cells as a row has.

    Args:
        layout: Where text and image stand.
    """

    def __init__(self, layout: TextImageLayout) -> None:
        self.width = layout.width
        self.cached: Tensor | None = None

    def shift(self, index: int, x: Tensor) -> Tensor:
        """Image position ``index`` of every candidate, in order: (P, n, d) to (P, n, d)."""
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


def attend_readable(query: Tensor, key: Tensor, value: Tensor, mask: Mask, readable: Tensor) -> Tensor:
    """Attention that leaves out padding: (B, H, M, D) each and bool (B, T + 1) to (B, H, M, D).

    Under `full` masks nobody reads it, under the others the image alone does not, as the original has it.
    """
    length, text = query.shape[-2], readable.shape[1]
    allowed = mask.dense(query.device)[None, :length, :length].repeat(len(query), 1, 1)
    allowed[:, 0 if mask.spec == "full" else text :, :text] &= readable[:, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None])


class Attention(nn.Module):
    """Projections of multi-head attention; queries, keys and also values are rotated. Which mask is the layer's.

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
    """GEGLU with a hidden width of 4 d: one half of the first matrix gates the other through an exact GELU."""

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
    """Normalization of a hidden state: ``layer``, or ``rms``, whose original bounds the root from below at 1e-8."""
    return nn.LayerNorm(width) if norm == "layer" else nn.RMSNorm(width, eps=1e-16)


class Branch(nn.Module):
    """What stands round an attention or an MLP in its layer: normalization before and behind it, and a scale.

    Args:
        width: Model width d.
        norm: Which normalization, as of `make_norm`.
        norm_behind: Whether there is a second normalization (sandwich norm).
        scale: First value of a learned scale of every channel (LayerScale); None if there is none.
    """

    def __init__(self, width: int, *, norm: str, norm_behind: bool, scale: float | None) -> None:
        super().__init__()
        self.norm = make_norm(norm, width)
        self.norm_behind = make_norm(norm, width) if norm_behind else nn.Identity()
        self.scale = None if scale is None else nn.Parameter(torch.full((width,), scale))

    def close(self, x: Tensor) -> Tensor:
        """What is added to the identity path, from the output of attention or MLP: (…, d) to (…, d)."""
        x = self.norm_behind(x)
        return x if self.scale is None else x * self.scale
