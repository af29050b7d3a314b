"""Plots masks: the complete matrix, and the cells that single image positions attend to."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_zoo.files import atomic_write, check_ending
from dalle_zoo.masks.layout import MASKS, TextImageLayout
from dalle_zoo.masks.plan import Mask
from dalle_zoo.masks.spec import MaskSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# T text positions, N image positions, L = T + N, H W image grid

# Kinds of cell: index into the colors. Legible to color-blind readers and in gray print.
_FUTURE, _UNREAD, _TEXT_TEXT, _IMAGE_TEXT, _IMAGE_IMAGE, _QUERY = range(6)
_COLORS = ("#d9d9d9", "#ffffff", "#56b4e9", "#009e73", "#e69f00", "#7a0177")

_ENDINGS = (".png", ".pdf", ".svg")
_PANEL_WIDTH, _ROW_HEIGHT, _SIDE = 5.1, 6.7, 4.2  # inches
_LARGEST_NUMBERED_GRID = 12  # wider grids leave no room for a number in a cell
_SMALLEST_NAMED_TEXT = 0.17  # share of the matrix side that a quadrant's name needs
_LARGEST_LINED_MATRIX = 100  # more positions than this, and the grid lines would hide the cells


def plot_masks(specs: Iterable[str], layout: TextImageLayout, path: str | os.PathLike[str]) -> None:
    """Plots masks below each other, in three panels each.

    The panels are the matrix of all T + N positions with its quadrants, and on the image grid the cells that two
    queries attend to: one near the center, and one at the left edge, where rows wrap around.

    Args:
        specs: Masks to plot, such as ``["row", "conv(kernel=3)"]``.
        layout: Positions of text and image; grids up to about 32 x 32 stay legible.
        path: File to write atomically: ``.png``, ``.pdf`` or ``.svg``.

    Raises:
        ValueError: There are no specs, the file format is unknown, or `Mask.from_spec` rejects a spec.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    check_ending("path", path, _ENDINGS)
    masks = [Mask.from_spec(spec, layout) for spec in specs]
    if not masks:
        raise ValueError(f"specs is empty: name at least one mask of {', '.join(MASKS)}")

    figure = Figure(figsize=(3 * _PANEL_WIDTH, _ROW_HEIGHT * len(masks)), facecolor="white")
    FigureCanvasAgg(figure)
    for index, mask in enumerate(masks):
        _plot_row(figure, mask, bottom=_ROW_HEIGHT * (len(masks) - 1 - index))

    with atomic_write(path) as aside:
        figure.savefig(aside, format=path.suffix[1:].lower(), dpi=110)


def _plot_row(figure: Figure, mask: Mask, bottom: float) -> None:
    """Plots one mask: header, matrix, two grids; ``bottom`` is in inches."""
    width, height = figure.get_size_inches()
    lines = (inspect.getdoc(MASKS[MaskSpec.parse(mask.spec).name]) or "").splitlines()
    plan, table = mask.cache_plan(), mask.decode_table()
    facts = (
        f"each image position attends to all {mask.layout.text} text keys and up to "
        f"{table.keys.shape[1]} image keys   ·   {mask.density:.1%} of all causal pairs   ·   "
        f"decoding keeps at most {plan.num_slots} of {mask.layout.image} image keys in the cache"
    )
    for text, y, size, weight in (
        (mask.spec, 0.45, 17, "bold"),
        (lines[0] if lines else "", 0.75, 12, "normal"),
        (facts, 1.02, 10.5, "normal"),
    ):
        top = (bottom + _ROW_HEIGHT - y) / height
        figure.text(0.55 / width, top, text, fontsize=size, fontweight=weight)

    def panel(column: int) -> Axes:
        left = 0.55 + column * _PANEL_WIDTH
        return figure.add_axes((left / width, (bottom + 0.9) / height, _SIDE / width, _SIDE / height))

    _plot_matrix(panel(0), mask)
    row, column = mask.layout.height // 2, mask.layout.width // 2
    _plot_grid(panel(1), mask, row, column, "near the center")
    _plot_grid(panel(2), mask, row, 0, "at the left edge")


def _plot_matrix(axes: Axes, mask: Mask) -> None:
    import numpy as np

    text, length = mask.layout.text, mask.layout.length
    kinds = np.full((length, length), _UNREAD)
    kinds[np.triu_indices(length, 1)] = _FUTURE
    dense = mask.dense().numpy()
    kinds[:text, :text][dense[:text, :text]] = _TEXT_TEXT
    kinds[text:, :text][dense[text:, :text]] = _IMAGE_TEXT
    kinds[text:, text:][dense[text:, text:]] = _IMAGE_IMAGE
    _paint(axes, kinds, lined=length <= _LARGEST_LINED_MATRIX)
    axes.axhline(text - 0.5, color="black", linewidth=1.6)
    axes.axvline(text - 0.5, color="black", linewidth=1.6)
    middle_of_text, middle_of_image = (text - 1) / 2, text + (mask.layout.image - 1) / 2
    parts = [f"text ({text})", f"image ({mask.layout.image})"]
    axes.set_xticks([middle_of_text, middle_of_image], parts)
    axes.set_yticks([middle_of_text, middle_of_image], parts, rotation=90, va="center")
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9.5)
    axes.set_xlabel("keys", fontsize=9.5)
    axes.set_ylabel("queries", fontsize=9.5)
    axes.xaxis.set_label_position("top")
    right, above = (text - 0.5 + share * mask.layout.image for share in (0.72, 0.22))
    _name_quadrant(axes, right, above, "image → image\nby the mask")
    if text >= _SMALLEST_NAMED_TEXT * length:  # otherwise only the legend names the quadrants
        _name_quadrant(axes, middle_of_text, middle_of_text, "text → text\ncausal")
        _name_quadrant(axes, middle_of_text, middle_of_image, "image → text\nall")
        _name_quadrant(axes, middle_of_image, middle_of_text, "text → image\nnever")
    _legend(
        axes,
        {
            _TEXT_TEXT: "text → text: causal",
            _IMAGE_TEXT: "image → text: all",
            _IMAGE_IMAGE: "image → image: attended",
            _UNREAD: "past, not attended",
            _FUTURE: "future, never attended",
        },
    )


def _plot_grid(axes: Axes, mask: Mask, row: int, column: int, where: str) -> None:
    import numpy as np

    layout = mask.layout
    query = row * layout.width + column
    kinds = np.full(layout.image, _UNREAD)
    kinds[query + 1 :] = _FUTURE
    read = mask.dense().numpy()[layout.text + query, layout.text :]
    kinds[read] = _IMAGE_IMAGE
    kinds[query] = _QUERY
    _paint(axes, kinds.reshape(layout.height, layout.width), lined=True)
    numbered = max(layout.height, layout.width) <= _LARGEST_NUMBERED_GRID
    if numbered:
        for key in read.nonzero()[0].tolist():
            axes.text(
                key % layout.width,
                key // layout.width,
                str(query - key),
                ha="center",
                va="center",
                fontsize=9,
                color="white" if key == query else "black",
            )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(
        f"image grid: query {where} (row {row}, column {column})\nattends to {int(read.sum())} cells, itself included",
        fontsize=10.5,
    )
    _legend(
        axes,
        {
            _QUERY: "the query itself",
            _IMAGE_IMAGE: "attended" + (" (number: offset back)" if numbered else ""),
            _UNREAD: "past, not attended",
            _FUTURE: "not sampled yet",
        },
    )


def _name_quadrant(axes: Axes, x: float, y: float, name: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    axes.text(x, y, name, ha="center", va="center", fontsize=7, bbox=box)


def _paint(axes: Axes, kinds: NDArray[Any], *, lined: bool) -> None:
    from matplotlib.colors import ListedColormap

    axes.imshow(
        kinds,
        cmap=ListedColormap(_COLORS),
        vmin=-0.5,
        vmax=len(_COLORS) - 0.5,
        interpolation="nearest",
    )
    if lined:
        rows, columns = kinds.shape
        linewidth = min(0.4, 16 / max(rows, columns))
        for edge in range(1, rows):
            axes.axhline(edge - 0.5, color="#9a9a9a", linewidth=linewidth)
        for edge in range(1, columns):
            axes.axvline(edge - 0.5, color="#9a9a9a", linewidth=linewidth)


def _legend(axes: Axes, names: dict[int, str]) -> None:
    from matplotlib.patches import Patch

    axes.legend(
        handles=[
            Patch(facecolor=_COLORS[kind], edgecolor="#606060", linewidth=0.6, label=name)
            for kind, name in names.items()
        ],
        loc="upper left",
        bbox_to_anchor=(0, -0.01),
        ncols=2,
        fontsize=8.5,
        frameon=False,
        borderaxespad=0.2,
        columnspacing=1.2,
        handlelength=1.2,
    )
