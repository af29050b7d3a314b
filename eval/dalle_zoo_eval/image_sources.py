"""Image sources: rows of numbered samples with their images, from files or from a model.

What sample i shows depends on i alone, so any number of processes may share the work, and a killed run may continue,
without a change in the images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dalle_zoo.images import to_uint8
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo_eval.choices import Crop
from dalle_zoo_eval.datasets.base import Item
from dalle_zoo_eval.datasets.images import load_image
from dalle_zoo_eval.extractors.base import exact_float32
from dalle_zoo_eval.extractors.model_parts import encode
from dalle_zoo_eval.provenance import digest

# B samples, H W pixels

READERS = 4
"""Threads that decode images; the decoders of Pillow and torch leave the interpreter while they work."""
EVERY = 0
"""Instead of a number of candidates: all candidates of every sample, one after the other."""


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """The images of some samples."""

    images: dict[int, list[Tensor]]
    """For every number of candidates n, the image chosen among the first n, uint8 (3, H, W) each; for `EVERY` all N
    candidates of every sample. A source that generates nothing has 1 alone."""
    chosen: dict[int, list[int]]
    """Likewise the number of the chosen candidate; not for `EVERY`."""
    captions: list[str]
    """Caption of every sample, empty where there is none."""
    others: list[str]
    """Caption of another sample for each; empty where there are none."""


class ImageSource(Protocol):
    """A row of samples with their images."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that fixes the images, as plain data."""

    @property
    def counts(self) -> list[int]:
        """Numbers of candidates that are measured, smallest first; 1 where nothing is generated."""

    def __len__(self) -> int: ...

    def load(self, indices: Sequence[int]) -> ImageBatch:
        """The images of some samples."""


@dataclass(frozen=True, kw_only=True)
class GeneratedSet:
    """The images that are measured, and what is known of them besides their pixels."""

    source: ImageSource
    """The images."""
    record: dict[str, Any]
    """What the result file says of them."""
    keys: list[str]
    """Key of the dataset's image whose caption was the prompt, or of the image itself."""
    concepts: list[str]
    """Concept of what each prompt describes, or else its key."""
    texts: list[str] | None
    """Prompt of every image; None where they have none."""
    targets: list[Mapping[str, Any]]
    """What each image must show."""


class ImageFiles:
    """Images of files.

    Args:
        items: The samples, in order; each needs an image.
        crop: As in `load_image`.
        size: Side in pixels, or None to leave them as they are.
        source: sha256 of what the items were read from.
        others: Caption of another sample for each, where an extractor needs them.
    """

    def __init__(
        self, items: Sequence[Item], crop: Crop, size: int | None, *, source: str, others: Sequence[str] = ()
    ) -> None:
        without = [item.key for item in items if item.image is None]
        if without:
            raise ValueError(f"{len(without)} samples have no image, such as {without[0]!r}: it cannot be measured")
        self.items, self.crop, self.size, self.source = tuple(items), crop, size, source
        self.captions, self.others = [(item.captions or ("",))[0] for item in items], list(others)

    @property
    def identity(self) -> dict[str, Any]:
        """Source, order, crop and size."""
        order = [[i.key, c] for i, c in zip(self.items, self.captions, strict=True)]
        return {
            "kind": "files", "source": self.source, "crop": self.crop, "size": self.size,
            "samples": len(self.items), "order": digest([*order, *self.others]),
        }  # fmt: skip

    @property
    def counts(self) -> list[int]:
        """One image per sample."""
        return [1]

    def __len__(self) -> int:
        return len(self.items)

    def load(self, indices: Sequence[int]) -> ImageBatch:
        """Decodes the files, several at a time."""
        with ThreadPoolExecutor(READERS) as threads:
            images = list(threads.map(lambda i: load_image(self.items[i], self.crop, self.size), indices))
        captions, others = [self.captions[i] for i in indices], [self.others[i] for i in indices if self.others]
        return ImageBatch(images={1: images}, chosen={1: [0] * len(images)}, captions=captions, others=others)


class Reconstructions:
    """The images of another source, encoded and decoded by the image tokenizer of a model.

    Args:
        source: The images.
        pipe: The model.
        weights: sha256 of the model's files.
    """

    def __init__(self, source: ImageFiles, pipe: DallePipeline, weights: dict[str, str]) -> None:
        self.source, self.pipe = source, pipe
        self.tokenizer = {name: sha256 for name, sha256 in weights.items() if name.startswith("dvae/")}

    @property
    def identity(self) -> dict[str, Any]:
        """The images and the image tokenizer."""
        return {"kind": "reconstructions", "of": self.source.identity, "image_tokenizer": self.tokenizer}

    @property
    def counts(self) -> list[int]:
        """One image per sample."""
        return [1]

    def __len__(self) -> int:
        return len(self.source)

    def load(self, indices: Sequence[int]) -> ImageBatch:
        """Reconstructs the images of some samples."""
        batch = self.source.load(indices)
        with exact_float32(self.pipe.device):
            images = to_uint8(self.pipe.decode(encode(self.pipe, torch.stack(batch.images[1]))))
        return ImageBatch(images={1: list(images)}, chosen=batch.chosen, captions=batch.captions, others=batch.others)
