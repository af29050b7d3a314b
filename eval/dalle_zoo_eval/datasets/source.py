"""Captioned images of any source of `dalle_zoo.data.open_source`: shards, folders, bundled data."""

from __future__ import annotations

from pathlib import Path

from dalle_zoo.data import Sample, Skipped, open_source
from dalle_zoo.data.samples import captioned
from dalle_zoo_eval.datasets.base import DATASETS, EvalDataset, Item, clean_captions


@DATASETS.register("source")
def read_source(root: Path | None, split: str) -> EvalDataset:
    """Reads captioned images in their stored order and keeps the contents of the files in memory.

    A key ``<concept>_<style>`` states the concept of its image.

    Args:
        root: Not used, since ``split`` is a location.
        split: Location as for `open_source`, such as ``composition:train``.

    Raises:
        ValueError: The location cannot be opened.
    """
    del root
    source = open_source(split)
    records = list(source.read(seed=None, epoch=0, start=0, stop=source.num_samples))
    if any(isinstance(record, Sample) and record.captions for record in records):
        records = [captioned(record) for record in records]
    items = [
        Item(
            key=sample.key,
            image=sample.image,
            captions=clean_captions(sample.captions),
            concept=sample.key.rpartition("_")[0],
        )
        for sample in records
        if isinstance(sample, Sample)
    ]
    skipped = tuple(str(record) for record in records if isinstance(record, Skipped))
    return EvalDataset(name=f"source:{split}", root=split, items=tuple(items), skipped=skipped)
