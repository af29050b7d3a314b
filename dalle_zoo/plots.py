"""Reads and plots training curves."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dalle_zoo.files import atomic_write, check_ending

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRADIENT_SCALES = "log2_gradient_scale/"
"""How the curves of the gradient scales of residual blocks begin; the rest is the name of a block."""


CURVES = "metrics/metrics.csv"
"""Path of the curves in a run folder."""


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    r"""Returns the columns and the complete rows of a CSV file; nothing if it does not exist.

    A killed run may end in half a line, which is left out.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "metrics.csv")
        ...     _ = path.write_text("step,loss\n1,2.5\n2,1.")
        ...     read_rows(path)
        (['step', 'loss'], [{'step': '1', 'loss': '2.5'}])
    """
    if not path.is_file():
        return [], []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    reader = csv.DictReader(line for line in lines if line.endswith("\n"))
    rows = list(reader)
    return list(reader.fieldnames or ()), rows


def plot_curves(curves: Mapping[str, Mapping[int, float]], out: str | Path, title: str = "") -> Path:
    """Plots the curves of a run as PNG; ``train/loss`` and ``val/loss`` share a panel, gradient scales another.

    Args:
        curves: Name to (step to value).
        out: Where to, ``.png``; the file is written atomically.
        title: Above all panels.

    Returns:
        ``out``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     curves = {"train/loss": {1: 2.5, 2: 1.5}, "val/loss": {2: 1.75}}
        ...     plot_curves(curves, Path(folder, "curves.png")).stat().st_size > 0
        True
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    out = Path(out)
    check_ending("out", out)
    if not curves:
        raise ValueError("curves is empty: the run has logged nothing yet")
    panels: dict[str, list[str]] = defaultdict(list)
    for name in curves:
        scale = name.startswith(GRADIENT_SCALES)
        panels[GRADIENT_SCALES if scale else name.partition("/")[2] or name].append(name)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (panel, names) in zip(axes, panels.items(), strict=False):
        axis.set_title(panel, parse_math=False)
        axis.set_xlabel("step")
        plot = _plot_scales if panel == GRADIENT_SCALES else _plot_panel
        plot(axis, {name: curves[name] for name in names})
        axis.legend(fontsize="small")
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.suptitle(title, parse_math=False)  # a folder's name may have dollar signs
    with atomic_write(out) as aside:
        figure.savefig(aside, format="png", dpi=120)
    return out


def _plot_panel(axis: Axes, curves: Mapping[str, Mapping[int, float]]) -> None:
    for name, points in curves.items():
        mark = "." if len(points) < 30 else ""
        axis.plot(list(points), list(points.values()), marker=mark, linewidth=1, label=name)


def _plot_scales(axis: Axes, curves: Mapping[str, Mapping[int, float]]) -> None:
    """Plots the last scale of every residual block over the depth, as figure 12 of the paper."""
    by_depth = sorted(curves, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(9), name))
    kinds: dict[str, dict[int, float]] = defaultdict(dict)
    for number, name in enumerate(by_depth, 1):
        kinds[name.rpartition(".")[2]][number] = curves[name][max(curves[name])]
    for kind, points in kinds.items():
        axis.plot(list(points), list(points.values()), ".", label=kind)
    axis.set_title(f"log2 of the gradient scales, step {max(curves[by_depth[0]])}")
    axis.set_xlabel("residual block")
