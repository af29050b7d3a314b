"""Reference of the attention masks: what each attends to, its plot and its cost."""

from __future__ import annotations

import re
from pathlib import Path

from dalle_zoo.masks import MASKS, Mask, TextImageLayout, plot_masks
from tools.reference.markdown import escape, first_paragraph, options, prose, table

PLOTTED = TextImageLayout(text=16, height=16, width=16)
"""Positions of the plots."""
PAPER = TextImageLayout(text=256, height=32, width=32)
"""Positions of the paper's prior, for which costs are stated."""
HEAD = """\
# Masks

Every registered mask with its plot and its cost for the paper's layout: 256 text and 32 x 32 image positions.
[Masks](../../train/masks.md) explains how a recipe names them.
"""
COSTS = """\
*Keys* are the image positions that an image position attends to, besides all text. *Pairs* is the share of all causal
pairs of positions, and with it the cost of attention in training. *Cache* is the number of image positions whose keys
and values sampling stores for a layer; `full` stores all 1,024.
"""


def masks_page(images: Path) -> str:
    """Returns the page of all masks.

    Args:
        images: Folder for the plots.
    """
    rows, parts = [], []
    for name, factory in MASKS.items():
        mask = Mask.from_spec(name, PAPER)
        counts = mask.decode_table().valid.sum(1)
        rows.append(
            (
                f"[`{name}`](#{name})", first_paragraph(factory), f"{counts.double().mean():,.0f}",
                f"{mask.density:.0%}", f"{mask.cache_plan().num_slots:,}",
            )
        )  # fmt: skip
        plot_once(name, images / f"{name}.svg", factory)
        parts += [f"## {name}\n", _text(factory)]
        given = options(factory, skipped=1)
        parts += [f"Options: {given}.\n"] if given else []
        parts += [f"![The mask {name}](images/{name}.svg)\n"]
    head = ("mask", "an image position attends to, besides all text", "keys, mean", "pairs", "cache")
    return "\n".join([HEAD, table(head, rows), COSTS, *parts])


def plot_once(spec: str, path: Path, factory: object) -> None:
    """Plots a mask, unless the plot is newer than the sources of all masks."""
    sources = (Path(__file__).parents[2] / "dalle_zoo/masks").glob("*.py")
    if not path.is_file() or path.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_masks([spec], PLOTTED, path)


def _text(factory: object) -> str:
    paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", prose(factory)) if paragraph.strip()]
    return "\n\n".join(map(escape, paragraphs)) + "\n"
