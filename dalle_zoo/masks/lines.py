"""Queries in lines that share their keys: what makes exact attention under a sparse mask cheap to train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dalle_zoo.masks.layout import TextImageLayout

if TYPE_CHECKING:  # as in plan.py: listing masks does not wait for torch
    from torch import Tensor

# T text positions, N image positions, G lines of Q queries, U image keys that a line reads at most


@dataclass(frozen=True, eq=False)
class LinePlan:
    """Image queries grouped into lines (the rows or the columns of the grid), with the image keys of each line.

    A line's queries attend to all text and to the line's keys, so scores are G * Q * (T + U) instead of N * (T + N).
    """

    queries: Tensor
    """Image queries of each line, int64 (G, Q); each image position stands in one line."""
    keys: Tensor
    """Image keys of each line, int64 (G, U); padding repeats the line's first query."""
    allowed: Tensor
    """Which of the line's keys each of its queries reads, False at padding, bool (G, Q, U)."""


def plan_lines(reads: Tensor, layout: TextImageLayout) -> LinePlan:
    """Groups by rows or by columns, whichever needs fewer keys.

    Args:
        reads: Image-to-image part of the mask, bool (N, N).
        layout: Where text and image stand.
    """
    import torch

    grid = torch.arange(layout.image, device="cpu").view(layout.height, layout.width)
    plans = [_group(reads, queries) for queries in (grid, grid.t().contiguous())]
    return min(plans, key=lambda plan: plan.allowed.numel())


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
