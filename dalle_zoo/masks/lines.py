"""Queries in lines that share their keys: what makes exact attention under a sparse mask cheap to train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dalle_zoo.masks.layout import MaskMod, TextImageLayout

if TYPE_CHECKING:  # as in plan.py: listing masks does not wait for torch
    from torch import Tensor

# T text positions, N image positions, G lines of Q queries, U image keys that a line reads at most

KEY = 40
"""What it takes to bring a key and its value to a line and their gradients back, in units of one score: measured with
heads of 64 in float32, forward and backward pass."""
LARGEST_GROUP = 4
"""Rows or columns that one line holds at most."""


@dataclass(frozen=True)
class LineSizes:
    """Sizes of a line plan, which are known before the plan is built."""

    by_row: bool
    """Whether a line is made of rows of the grid, rather than of columns."""
    group: int
    """Rows or columns in one line."""
    num_lines: int
    """Lines G."""
    num_queries: int
    """Queries Q of each line."""
    num_keys: int
    """Image keys U of the line with most of them."""

    @property
    def num_gathered(self) -> int:
        """Queries and keys of all lines."""
        return self.num_lines * (self.num_queries + self.num_keys)

    @property
    def cost(self) -> int:
        """Cost of the image keys, in units of one score."""
        return self.num_lines * self.num_keys * (self.num_queries + KEY)


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
    def causal(self) -> bool:
        """Whether a line's keys are its queries, each of which reads itself and all before it."""
        import torch

        inside = self.allowed[0]
        return torch.equal(self.queries, self.keys) and bool((self.allowed == torch.ones_like(inside).tril()).all())


def line_sizes(layout: TextImageLayout, rows_apart: Tensor) -> LineSizes:
    """Returns the sizes of the cheapest grouping of rows or columns, one or a few per line.

    Args:
        layout: Positions of text and image.
        rows_apart: Image-to-image part of the mask by rows apart, query column and key column, bool (H, W, W).
    """
    import torch

    height, width = layout.height, layout.width
    read = rows_apart.any(1)  # (H, W)
    distances = torch.arange(height, device="cpu", dtype=torch.int32).view(-1, 1, 1)
    nearest = distances.where(rows_apart, height).amin(0)  # rows apart at which a column reads another first, (W, W)
    # Key rows below the first query of a line are read by its later queries alone.
    above = torch.cat([read.new_zeros(LARGEST_GROUP - 1, width), read])
    sizes = []
    for group in _divisors(height):
        # A line of the last rows has most keys: every row of keys that others see, and more.
        keys = above[LARGEST_GROUP - group :].unfold(0, group, 1).any(-1)
        sizes.append(LineSizes(True, group, height // group, group * width, int(keys.sum())))
    for group in _divisors(width):
        # Of a column of keys, all but the last ``nearest`` rows are read.
        keys = (height - nearest.view(width // group, group, width).amin(1)).sum(1)
        sizes.append(LineSizes(False, group, width // group, group * height, int(keys.max())))
    return min(sizes, key=lambda each: each.cost)


def line_sizes_of(layout: TextImageLayout, reads: MaskMod) -> LineSizes:
    """Returns what `line_sizes` does for any rule, from all pairs of a line at a time.

    Args:
        layout: Positions of text and image.
        reads: Image-to-image part of the mask, a function of raster indices.
    """
    import torch

    cells = torch.arange(layout.image, device="cpu")
    sizes = []
    for by_row, count in ((True, layout.height), (False, layout.width)):
        for group in _divisors(count):
            lines = _queries(layout, by_row, group)
            most = max(int(reads(line[:, None], cells).any(0).sum()) for line in lines)
            sizes.append(LineSizes(by_row, group, len(lines), lines.shape[1], most))
    return min(sizes, key=lambda each: each.cost)


def _divisors(count: int) -> Iterator[int]:
    return (size for size in range(1, LARGEST_GROUP + 1) if count % size == 0)


def _queries(layout: TextImageLayout, by_row: bool, group: int) -> Tensor:
    """Image positions of every line, (G, Q)."""
    import torch

    grid = torch.arange(layout.image, device="cpu").view(layout.height, layout.width)
    lines = grid if by_row else grid.t()
    return lines.reshape(len(lines) // group, -1)


def plan_lines(reads: Tensor, layout: TextImageLayout, sizes: LineSizes) -> LinePlan:
    """Groups image queries into lines.

    Args:
        reads: Image-to-image part of the mask, bool (N, N).
        layout: Positions of text and image.
        sizes: Which rows or columns form a line.
    """
    import torch

    queries = _queries(layout, sizes.by_row, sizes.group)
    rows = reads[queries]  # (G, Q, N)
    used = rows.any(1)  # (G, N)
    most = int(used.sum(1).max())
    keys = queries[:, :1].expand(-1, most).clone()
    line, key = used.nonzero(as_tuple=True)
    keys[line, used.cumsum(1)[line, key] - 1] = key
    filled = torch.arange(most, device="cpu") < used.sum(1, keepdim=True)
    allowed = rows.gather(2, keys[:, None].expand(-1, queries.shape[1], -1)) & filled[:, None]
    return LinePlan(queries, keys, allowed)
