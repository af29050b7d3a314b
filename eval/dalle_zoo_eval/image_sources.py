"""Image sources: numbered samples with their images, from files or from a model.

Sample i depends on i alone, so neither the number of processes nor an interruption of the run changes the images.
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
"""Number of threads that decode images; the decoders of Pillow and torch release the GIL."""
EVERY = 0
"""Used instead of a number of candidates: all candidates of every sample, one after the other."""


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """The images of some samples."""

    images: dict[int, list[Tensor]]
    """Images by number of candidates n: for every sample the one chosen among its first n, uint8 (3, H, W). The key
    `EVERY` has all N candidates of every sample. A source that generates nothing has only the key 1."""
    chosen: dict[int, list[int]]
    """Index of the chosen candidate of every sample by number of candidates; without `EVERY`."""
    captions: list[str]
    """Caption of every sample; empty if it has none."""
    others: list[str]
    """Caption of another sample for every sample. The list is empty if no extractor needs them."""


class ImageSource(Protocol):
    """Numbered samples with their images."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the images, as plain data."""

    @property
    def counts(self) -> list[int]:
        """Numbers of candidates to evaluate, smallest first; 1 if nothing is generated."""

    def __len__(self) -> int: ...

    def load(self, indices: Sequence[int]) -> ImageBatch:
        """Returns the images of some samples."""


@dataclass(frozen=True, kw_only=True)
class GeneratedSet:
    """The images to evaluate, with their annotations."""

    source: ImageSource
    """The images."""
    record: dict[str, Any]
    """Entry ``source`` of the result file."""
    keys: list[str]
    """Key of the dataset's image whose caption was the prompt, or key of the image itself."""
    concepts: list[str]
    """Concept of each prompt; its key if the dataset has no concepts."""
    texts: list[str] | None
    """Prompt of every image; None if images have no captions."""
    targets: list[Mapping[str, Any]]
    """What each image should show, for metrics that take ``targets``."""


class ImageFiles:
    """Reads images from files.

    Args:
        items: The samples, in order; each must have an image.
        crop: Crop, as in `load_image`.
        size: Side to which images are scaled, pixels; None leaves them unscaled.
        source: sha256 of the dataset.
        others: Caption of another sample for every sample, if an extractor needs them. Defaults to none.

    Raises:
        ValueError: An item has no image.
    """

    def __init__(
        self, items: Sequence[Item], crop: Crop, size: int | None, *, source: str, others: Sequence[str] = ()
    ) -> None:
        without = [item.key for item in items if item.image is None]
        if without:
            raise ValueError(
                f"{len(without)} samples have no image, such as {without[0]!r}: leave them out or add their images"
            )
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
        """Decodes the images of some samples in parallel."""
        with ThreadPoolExecutor(READERS) as threads:
            images = list(threads.map(lambda i: load_image(self.items[i], self.crop, self.size), indices))
        captions, others = [self.captions[i] for i in indices], [self.others[i] for i in indices if self.others]
        return ImageBatch(images={1: images}, chosen={1: [0] * len(images)}, captions=captions, others=others)


class Reconstructions:
    """Encodes and decodes the images of another source with the image tokenizer of a model.

    Args:
        source: The original images.
        pipe: The model.
        weights: sha256 of the model's files by name.
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
