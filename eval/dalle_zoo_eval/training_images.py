"""Training images of a folder or of shards, as an image source."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_zoo.data import open_source
from dalle_zoo.data.decoding import CorruptImageError, decode_image
from dalle_zoo.data.samples import Sample
from dalle_zoo.data.selection import valid_name
from dalle_zoo_eval.choices import Crop
from dalle_zoo_eval.datasets.images import fit_image
from dalle_zoo_eval.image_sources import READERS, ImageBatch

BLOCK = 1000
"""Samples read together: a shard can only be read from its beginning, and chunks are small."""
UNREADABLE = -1
"""Replaces the candidate number of an image that cannot be read; such an image is black."""


class TrainingImages:
    """Images of a training set in their stored order.

    Args:
        location: Location for `dalle_zoo.data.open_source`: a folder, shards, or a pattern of shards.
        crop: ``none`` or ``center``, as in `load_image`.
        size: Side of the images, pixels.

    Raises:
        ValueError: The location does not exist or holds nothing usable.
    """

    def __init__(self, location: str | Path, crop: Crop, size: int) -> None:
        self.source, self.crop, self.size = open_source(location), crop, size
        self.name = valid_name(Path(location).name)
        self._block: tuple[int, list[Sample | None]] = (-1, [])

    @property
    def identity(self) -> dict[str, Any]:
        """Names and sizes of the files, crop and size."""
        return {
            "kind": "training", "source": self.source.fingerprint(), "samples": len(self),
            "crop": self.crop, "size": self.size,
        }  # fmt: skip

    @property
    def counts(self) -> list[int]:
        """One image per sample."""
        return [1]

    def __len__(self) -> int:
        return self.source.num_samples

    def load(self, indices: Sequence[int]) -> ImageBatch:
        """Reads and decodes some samples; fastest with increasing indices."""
        samples = [self._sample(index) for index in indices]
        with ThreadPoolExecutor(READERS) as threads:
            images = list(threads.map(self._decode, samples))
        return ImageBatch(
            images={1: [self._black() if image is None else image for image in images]},
            chosen={1: [UNREADABLE if image is None else 0 for image in images]},
            captions=[""] * len(images),
            others=[],
        )

    def key(self, index: int) -> str:
        """Returns the name of a sample."""
        sample = self._sample(index)
        return sample.key if sample is not None else f"number {index}"

    def _black(self) -> Tensor:
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8)

    def _decode(self, sample: Sample | None) -> Tensor | None:
        if sample is None:
            return None
        try:
            return fit_image(decode_image(sample.image), self.crop, self.size)
        except CorruptImageError:
            return None

    def _sample(self, index: int) -> Sample | None:
        number, place = divmod(index, BLOCK)
        if self._block[0] != number:
            self._block = (number, self._read(number * BLOCK, min((number + 1) * BLOCK, len(self))))
        return self._block[1][place]

    def _read(self, start: int, stop: int) -> list[Sample | None]:
        """Returns the samples at some positions, None for those that cannot be read."""
        records = self.source.read(seed=None, epoch=0, start=start, stop=stop)
        found = [record if isinstance(record, Sample) else None for record in records if record.listed]
        return [*found, *[None] * (stop - start - len(found))]  # a damaged shard may end early
