"""Multi-head self-attention as a module."""

from __future__ import annotations

from torch import Tensor, nn

from dalle_zoo.masks import Mask
from dalle_zoo.models.attention.backends import BACKENDS

# B batch, L positions, H heads, D head size, d = H * D model width


class Attention(nn.Module):
    """Multi-head self-attention under a fixed mask.

    Reference: Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), appendix B.1.

    Args:
        width: Model width d.
        num_heads: Number of heads H; must divide the width.
        mask: Which positions attend to which.
        backend: Name in `BACKENDS`. Defaults to "auto".

    Example:
        >>> import torch
        >>> from dalle_zoo.masks import TextImageLayout
        >>> attention = Attention(8, 2, Mask.from_spec("row", TextImageLayout(text=2, height=2, width=2)))
        >>> x = torch.randn(1, 6, 8)
        >>> before, x[:, 5] = attention(x), 0.0  # no position before 5 attends to it
        >>> torch.allclose(attention(x)[:, :5], before[:, :5], atol=1e-5)
        True
    """

    def __init__(self, width: int, num_heads: int, mask: Mask, backend: str = "auto") -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide width {width}: change one of them")
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
        """Mixes the positions of the mask or a prefix of them: (B, L, d) to (B, L, d)."""
        return self.merge(self.backend(*self.project(x), self.mask))
