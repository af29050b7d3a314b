"""Captioned images wherever `dalle_zoo.data.open_source` finds them: shards, folders, data in the package."""

from __future__ import annotations

from pathlib import Path

from dalle_zoo.data import open_source
from dalle_zoo_eval.datasets.base import DATASETS, EvalDataset, Item, clean_captions


@DATASETS.register("source")
def read_source(root: Path | None, split: str) -> EvalDataset:
    """Reads captioned images in their stored order; the contents of the files stay in memory.

    A key ``<concept>_<style>`` names the concept of its image.

    Args:
        root: Not used: the location says all.
        split: Location as for `open_source`, such as ``emoji64:train``.

    Raises:
        ValueError: The location cannot be opened.
    """
    del root
    items = [
        Item(
            key=sample.key,
            image=sample.image,
            captions=clean_captions(sample.captions),
            concept=sample.key.rpartition("_")[0],
        )
        for sample in open_source(split).stream()
    ]
    if any(item.captions for item in items):
        items = [item for item in items if item.captions]
    return EvalDataset(name=f"source:{split}", root=split, items=tuple(items))
