"""Queries in lines that share their keys: what makes exact attention under a sparse mask cheap to train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dalle_zoo.masks.layout import TextImageLayout

if TYPE_CHECKING:  # as in plan.py: listing masks does not wait for torch
    from torch import Tensor

# T text positions, N image positions, G lines of Q queries, U image keys that a line reads at most

KEY = 40
"""What it takes to bring a key and its value to a line and their gradients back, in units of one score: measured with
heads of 64 in float32, forward and backward pass."""
LARGEST_GROUP = 4
"""Rows or columns that one line holds at most."""


@dataclass(frozen=True, eq=False)
class LinePlan:
    """Image queries grouped into lines, with the image keys of each line: a few rows or columns of the grid.

    A line's queries attend to all text and to the line's keys, so scores are G * Q * (T + U) instead of N * (T + N).
    """

    queries: Tensor
    """Image queries of each line, int64 (G, Q); each image position stands in one line."""
    keys: Tensor
    """Image keys of each line, int64 (G, U); padding repeats the line's first query."""
    allowed: Tensor
    """Which of the line's keys each of its queries reads, False at padding, bool (G, Q, U)."""

    @property
    def cost(self) -> int:
        """What the image keys take, in units of one score."""
        return self.allowed.numel() + KEY * self.keys.numel()

    @property
    def causal(self) -> bool:
        """Whether a line's keys are its queries, each of which reads itself and all before it."""
        import torch

        inside = self.allowed[0]
        return torch.equal(self.queries, self.keys) and bool((self.allowed == torch.ones_like(inside).tril()).all())


def plan_lines(reads: Tensor, layout: TextImageLayout) -> LinePlan:
    """Groups rows or columns, one or a few to a line, as it costs least.

    Args:
        reads: Image-to-image part of the mask, bool (N, N).
        layout: Where text and image stand.
    """
    import torch

    grid = torch.arange(layout.image, device="cpu").view(layout.height, layout.width)
    plans = [
        _group(reads, lines.reshape(-1, size * lines.shape[1]))
        for lines in (grid, grid.t().contiguous())
        for size in range(1, LARGEST_GROUP + 1)
        if len(lines) % size == 0
    ]
    return min(plans, key=lambda plan: plan.cost)


def _group(reads: Tensor, queries: Tensor) -> LinePlan:
    import torch

    rows = reads[queries]  # (G, Q, N)
    used = rows.any(1)  # (G, N)
    most = int(used.sum(1).max())
    keys = queries[:, :1].expand(-1, most).clone()
    line, key = used.nonzero(as_tuple=True)
    keys[line, used.cumsum(1)[line, key] - 1] = key
    filled = torch.arange(most, device="cpu") < used.sum(1, keepdim=True)
    allowed = rows.gather(2, keys[:, None].expand(-1, queries.shape[1], -1)) & filled[:, None]
    return LinePlan(queries, keys, allowed)
