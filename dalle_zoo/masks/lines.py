"""Groups queries into lines that share their keys, which makes exact attention under a sparse mask cheap to train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dalle_zoo.masks.layout import MaskMod, TextImageLayout

if TYPE_CHECKING:  # as in plan.py: listing masks does not import torch
    from torch import Tensor

# T text positions, N image positions, G lines of Q queries, U largest number of image keys of a line

KEY = 40
"""Cost of gathering a key and its value for a line and of scattering their gradients, in units of one score; measured
with heads of 64 in float32, forward and backward pass."""
LARGEST_GROUP = 4
"""Largest number of rows or columns in one line."""


@dataclass(frozen=True)
class LineSizes:
    """Sizes of a line plan, known before the plan is built."""

    by_row: bool
    """Whether a line consists of rows of the grid, not of columns."""
    group: int
    """Number of rows or columns in one line."""
    num_lines: int
    """Number of lines G."""
    num_queries: int
    """Number of queries Q of each line."""
    num_keys: int
    """Largest number of image keys U of a line."""

    @property
    def num_gathered(self) -> int:
        """Number of queries and keys of all lines."""
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
    """Image queries of each line, int64 (G, Q); each image position is in exactly one line."""
    keys: Tensor
    """Image keys of each line, int64 (G, U); padding repeats the line's first query."""
    allowed: Tensor
    """Which keys of the line each of its queries attends to, False at padding, bool (G, Q, U)."""

    @property
    def causal(self) -> bool:
        """Whether the keys of a line are its queries, and each attends to itself and to all before it."""
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
    # Smallest number of rows apart at which a column attends to another, (W, W).
    nearest = distances.where(rows_apart, height).amin(0)
    # Only the later queries of a line attend to key rows below its first query.
    above = torch.cat([read.new_zeros(LARGEST_GROUP - 1, width), read])
    sizes = []
    for group in _divisors(height):
        # A line of the last rows has the most keys: those of the other lines, shifted, and more.
        keys = above[LARGEST_GROUP - group :].unfold(0, group, 1).any(-1)
        sizes.append(LineSizes(True, group, height // group, group * width, int(keys.sum())))
    for group in _divisors(width):
        # All but the last ``nearest`` rows of a column of keys are attended to.
        keys = (height - nearest.view(width // group, group, width).amin(1)).sum(1)
        sizes.append(LineSizes(False, group, width // group, group * height, int(keys.max())))
    return min(sizes, key=lambda each: each.cost)


def line_sizes_of(layout: TextImageLayout, reads: MaskMod) -> LineSizes:
    """Returns the same as `line_sizes` for any rule, by evaluating all pairs of one line at a time.

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
