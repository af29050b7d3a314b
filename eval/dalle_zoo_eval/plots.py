"""Figures of a report: scores by blur radius or number of candidates, and grouped bars."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# Colors of Okabe and Ito, which color-blind people can distinguish; their yellow is too pale on white.
_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#000000")
_GRAYS = ("0.35", "0.5", "0.65")
_MARKERS = "os^Dv"
_DASHES = ("--", "-.", ":")
Form = Literal["png", "pdf"]
LABELED = 20
"""Bars of a figure at most that have their value above them: more would overlap."""
_OPEN_MARKERS = "oxsD^+v*"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a figure."""

    label: str
    """Label in the legend."""
    points: Mapping[int, float]
    """Score by place on the axis."""
    intervals: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """Lowest and highest plausible score by place, where known."""
    measured: bool
    """Measured lines are thick and colored; published ones are thin and gray."""
    comparable: bool = True
    """False makes the line dotted: its number of samples differs."""


def line_figure(
    lines: Sequence[Line], *, title: str, score: str, axis: str, logarithmic: bool = False, form: Form = "png"
) -> bytes:
    """Plots lines with a legend to their right.

    Args:
        lines: At least one, with at least one point each.
        title: Title of the figure.
        score: Label of the y axis.
        axis: Label of the x axis.
        logarithmic: Whether the x axis is logarithmic (candidates). Defaults to equally spaced places, as in figure 9
            of the paper.
        form: Format of the file. Defaults to PNG.

    Returns:
        The file.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    if not lines or not all(line.points for line in lines):
        raise ValueError("a figure needs at least one line, and every line at least one point")
    places = sorted({place for line in lines for place in line.points})
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axes = figure.subplots()
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
    else:
        axes.set_xticks(range(len(places)), [str(place) for place in places])
    numbers = {True: 0, False: 0}
    handles: list[Any] = []
    labels: list[str] = []
    ordered = sorted(lines, key=lambda line: not line.measured)
    for line in ordered:
        number = numbers[line.measured]
        numbers[line.measured] += 1
        at = {place: place if logarithmic else places.index(place) for place in line.points}
        x = [at[place] for place in sorted(line.points)]
        y = [line.points[place] for place in sorted(line.points)]
        handles += axes.plot(x, y, **_style(line, number))
        labels.append(textwrap.fill(line.label, 34))
        for place, (low, high) in line.intervals.items():
            if place in at:
                color = _COLORS[number % len(_COLORS)]
                axes.vlines(at[place], low, high, colors=color, linewidth=3, alpha=0.4, zorder=3)
    axes.set_title(title, parse_math=False)
    axes.set_xlabel(axis)
    axes.set_ylabel(score)
    return _finished(figure, axes, handles, labels, form)


def bar_figure(bars: Mapping[str, Mapping[str, float]], *, title: str, score: str, form: Form = "png") -> bytes:
    """Plots groups of bars, each with its value above it where there is room.

    Args:
        bars: Heights by group, for each color by its label; at most five colors, all with the same groups.
        title: Title of the figure.
        score: Label of the y axis.
        form: Format of the file. Defaults to PNG.

    Returns:
        The file.
    """
    from matplotlib.figure import Figure

    groups = list(next(iter(bars.values()), {}))
    if not groups or len(bars) > len(_COLORS) or any(list(heights) != groups for heights in bars.values()):
        raise ValueError(f"a figure needs one to {len(_COLORS)} kinds of bars, each with a height in the same groups")
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(bars)
    handles = []
    for number, heights in enumerate(bars.values()):
        places = [group + (number - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        handles.append(axes.bar(places, list(heights.values()), 0.9 * width, color=_COLORS[number]))
        if len(bars) * len(groups) <= LABELED:
            axes.bar_label(handles[-1], fmt="{:.2f}", fontsize=8, padding=1)
    axes.set_xticks(range(len(groups)), groups, parse_math=False)
    axes.set_title(title, parse_math=False)
    axes.set_ylabel(score)
    return _finished(figure, axes, handles, [textwrap.fill(label, 34) for label in bars], form)


def _finished(figure: Any, axes: Any, handles: Sequence[Any], labels: Sequence[str], form: Form) -> bytes:
    """Adds grid and legend, and returns the file."""
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # To the right of the axes, where it hides nothing.
    legend = axes.legend(
        handles, ["-"] * len(handles), loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)  # a pair of dollar signs is not a formula
        text.set_text(label)  # set afterwards: the legend would omit a name that begins with an underscore
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name with letters that the font lacks
        # Without the version of matplotlib and the date in the file, equal scores give equal files.
        unstable = ("Software",) if form == "png" else ("Creator", "Producer", "CreationDate")
        figure.savefig(file, format=form, dpi=110, metadata=dict.fromkeys(unstable))
    return file.getvalue()


def _style(line: Line, number: int) -> dict[str, Any]:
    if line.measured:
        return {
            "color": _COLORS[number % len(_COLORS)],
            "linestyle": "-" if line.comparable else ":",
            "linewidth": 2.2,
            "marker": _MARKERS[number % len(_MARKERS)],
            "markersize": 6,
            "zorder": 4,
        }
    return {
        "color": _GRAYS[number % len(_GRAYS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "linewidth": 1.2,
        "marker": _OPEN_MARKERS[number % len(_OPEN_MARKERS)],
        "markerfacecolor": "white",
        "markersize": 5,
        "zorder": 2,
    }
