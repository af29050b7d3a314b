"""Plots masks: the complete matrix, and the cells that single image positions attend to."""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_zoo.files import atomic_write, check_ending
from dalle_zoo.masks.layout import MASKS, TextImageLayout
from dalle_zoo.masks.plan import Mask
from dalle_zoo.masks.spec import MaskSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from numpy.typing import NDArray

# T text positions, N image positions, L = T + N, H W image grid

# Kinds of cell: index into the colors. Legible to color-blind readers and in gray print.
_FUTURE, _UNREAD, _TEXT_TEXT, _IMAGE_TEXT, _IMAGE_IMAGE, _QUERY = range(6)
_COLORS = ("#d9d9d9", "#ffffff", "#56b4e9", "#009e73", "#e69f00", "#7a0177")

_ENDINGS = (".png", ".pdf", ".svg")
_MATRIX_NAMES = {
    _TEXT_TEXT: "text → text: causal",
    _IMAGE_TEXT: "image → text: all",
    _IMAGE_IMAGE: "image → image: attended",
    _UNREAD: "past, not attended",
    _FUTURE: "future, never attended",
}
_PANEL_WIDTH, _ROW_HEIGHT, _SIDE = 5.1, 6.7, 4.2  # inches, of one mask
_CARD_WIDTH, _CARD_HEIGHT, _LEGEND_HEIGHT = 3.1, 6.7, 0.3  # inches, of the overview
_MOST_COLUMNS = 4
_LARGEST_NUMBERED_GRID = 12  # wider grids leave no room for a number in a cell
_SMALLEST_NAMED_TEXT = 0.17  # share of the matrix side that a quadrant's name needs
_LARGEST_LINED_MATRIX = 100  # more positions than this, and the grid lines would hide the cells


def plot_masks(specs: Iterable[str], layout: TextImageLayout, path: str | os.PathLike[str]) -> None:
    """Plots one mask in detail, or several in an overview.

    The panels of one mask are the matrix of all T + N positions with its quadrants, and on the image grid the cells
    that two queries attend to: one near the center, and one at the left edge, where rows wrap around. The overview has
    a column per mask, with its matrix and the cells of the query near the center.

    Args:
        specs: Masks to plot, such as ``["row", "conv(kernel=3)"]``.
        layout: Positions of text and image; grids up to about 32 x 32 stay legible.
        path: File to write atomically: ``.png``, ``.pdf`` or ``.svg``.

    Raises:
        ValueError: There are no specs, the file format is unknown, or `Mask.from_spec` rejects a spec.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_masks(["row"], TextImageLayout(text=2, height=3, width=3), Path(folder, "row.svg"))
        ...     "row 1, column 1" in Path(folder, "row.svg").read_text(encoding="utf-8")
        True
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    check_ending("path", path, _ENDINGS)
    masks = [Mask.from_spec(spec, layout) for spec in specs]
    if not masks:
        raise ValueError(f"specs is empty: name at least one mask of {', '.join(MASKS)}")

    figure = Figure(facecolor="white")
    FigureCanvasAgg(figure)
    if len(masks) == 1:
        _plot_in_detail(figure, masks[0])
    else:
        _plot_overview(figure, masks)

    with atomic_write(path) as aside:
        figure.savefig(aside, format=path.suffix[1:].lower(), dpi=110)


def _plot_overview(figure: Figure, masks: Sequence[Mask]) -> None:
    """Plots masks next to each other, `_MOST_COLUMNS` in a row: header, matrix and grid."""
    columns = min(len(masks), _MOST_COLUMNS)
    rows = -(-len(masks) // columns)
    names = _MATRIX_NAMES | {_QUERY: "the query of the grid"}
    per_line = columns * 3 // 2  # names of the legend
    legend = _LEGEND_HEIGHT * -(-len(names) // per_line)
    figure.set_size_inches(columns * _CARD_WIDTH, rows * _CARD_HEIGHT + legend)
    width, height = figure.get_size_inches()
    for index, mask in enumerate(masks):
        left, top = index % columns * _CARD_WIDTH + 0.2, height - index // columns * _CARD_HEIGHT
        for text, y, size, weight in (
            (mask.spec, 0.25, 14, "bold"),
            ("\n".join(textwrap.wrap(_first_line(mask), 46, max_lines=2, placeholder=" …")), 0.6, 8, "normal"),
        ):
            figure.text(left / width, (top - y) / height, text, fontsize=size, fontweight=weight, va="center")
        side = _CARD_WIDTH - 0.4
        for plot, bottom in ((_plot_matrix, 0.85 + side), (_plot_query, 0.95 + 2 * side)):
            plot(figure.add_axes((left / width, (top - bottom) / height, side / width, side / height)), mask)
    figure.legend(handles=_patches(names), loc="lower center", ncols=per_line, fontsize=9, frameon=False)


def _plot_query(axes: Axes, mask: Mask) -> None:
    """Plots the cells that the query near the center attends to."""
    row, column = mask.layout.height // 2, mask.layout.width // 2
    read = _plot_cells(axes, mask, row, column)
    axes.set_xlabel(f"row {row}, column {column} attends to {read} of {mask.layout.image} cells", fontsize=8.5)


def _first_line(mask: Mask) -> str:
    return (inspect.getdoc(MASKS[MaskSpec.parse(mask.spec).name]) or "").partition("\n")[0]


def _plot_in_detail(figure: Figure, mask: Mask) -> None:
    """Plots one mask: header, matrix with names of its quadrants, two grids."""
    figure.set_size_inches(3 * _PANEL_WIDTH, _ROW_HEIGHT)
    width, height = figure.get_size_inches()
    plan, table = mask.cache_plan(), mask.decode_table()
    facts = (
        f"each image position attends to all {mask.layout.text} text keys and up to "
        f"{table.keys.shape[1]} image keys   ·   {mask.density:.1%} of all causal pairs   ·   "
        f"decoding keeps at most {plan.num_slots} of {mask.layout.image} image keys in the cache"
    )
    for text, y, size, weight in (
        (mask.spec, 0.45, 17, "bold"),
        (_first_line(mask), 0.75, 12, "normal"),
        (facts, 1.02, 10.5, "normal"),
    ):
        figure.text(0.55 / width, (height - y) / height, text, fontsize=size, fontweight=weight)

    def panel(column: int) -> Axes:
        left = 0.55 + column * _PANEL_WIDTH
        return figure.add_axes((left / width, 0.9 / height, _SIDE / width, _SIDE / height))

    matrix = panel(0)
    _plot_matrix(matrix, mask)
    _label_matrix(matrix, mask)
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
    axes.set_xticks([])
    axes.set_yticks([])


def _label_matrix(axes: Axes, mask: Mask) -> None:
    """Adds the names of the axes and of the quadrants, and a legend."""
    text, length = mask.layout.text, mask.layout.length
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
    _legend(axes, _MATRIX_NAMES)


def _plot_cells(axes: Axes, mask: Mask, row: int, column: int) -> int:
    """Plots the cells that one image position attends to, and returns their number."""
    import numpy as np

    layout = mask.layout
    query = row * layout.width + column
    kinds = np.full(layout.image, _UNREAD)
    kinds[query + 1 :] = _FUTURE
    read = mask.dense().numpy()[layout.text + query, layout.text :]
    kinds[read] = _IMAGE_IMAGE
    kinds[query] = _QUERY
    _paint(axes, kinds.reshape(layout.height, layout.width), lined=True)
    if _is_numbered(mask):
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
    return int(read.sum())


def _is_numbered(mask: Mask) -> bool:
    return max(mask.layout.height, mask.layout.width) <= _LARGEST_NUMBERED_GRID


def _plot_grid(axes: Axes, mask: Mask, row: int, column: int, where: str) -> None:
    read = _plot_cells(axes, mask, row, column)
    axes.set_title(
        f"image grid: query {where} (row {row}, column {column})\nattends to {read} cells, itself included",
        fontsize=10.5,
    )
    _legend(
        axes,
        {
            _QUERY: "the query itself",
            _IMAGE_IMAGE: "attended" + (" (number: offset back)" if _is_numbered(mask) else ""),
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


def _patches(names: dict[int, str]) -> list[Patch]:
    from matplotlib.patches import Patch

    return [
        Patch(facecolor=_COLORS[kind], edgecolor="#606060", linewidth=0.6, label=name) for kind, name in names.items()
    ]


def _legend(axes: Axes, names: dict[int, str]) -> None:
    axes.legend(
        handles=_patches(names),
        loc="upper left",
        bbox_to_anchor=(0, -0.01),
        ncols=2,
        fontsize=8.5,
        frameon=False,
        borderaxespad=0.2,
        columnspacing=1.2,
        handlelength=1.2,
    )
