"""Data sets of training samples: pixels or codes with one caption, in a reproducible order."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.utils.data
from torch import Tensor

from dalle_zoo.composition.sprites import SIZE
from dalle_zoo.data.checks import check_caption_choice, check_positive
from dalle_zoo.data.composition import ComposedSample, CompositionSource
from dalle_zoo.data.decoding import CorruptImageError, decode_image
from dalle_zoo.data.samples import Sample, SampleSource, Skipped, captioned
from dalle_zoo.data.transforms import TRANSFORMS, Transform, sample_rng
from dalle_zoo.seeds import seeded_rng

log = logging.getLogger(__name__)

# h w code grid, L layers of a composed image

Item = dict[str, Any]
"""``key`` and ``caption`` (str), and ``image`` uint8 (3, size, size) or ``codes`` int64 (h, w). Composed images may
have ``layers``, uint8 (L, 3, size, size), ``cells``, int64 (h, w), and ``recolored``, int64 (L, 2), as in `Layers`."""


class Record(Protocol):
    """A stored sample that is not decoded yet."""

    @property
    def key(self) -> str:
        """Name, unique in its data set."""


class CaptionedDataset(torch.utils.data.IterableDataset[Item], ABC):
    """Base of data sets that read items by their position in an epoch.

    Reading is in two steps, `records` and `item`, so that what is read can be filtered before it is decoded.

    Example:
        >>> from dalle_zoo.data import open_source
        >>> dataset = ImageTextDataset(open_source("composition:train"), transform="prior", size=32)
        >>> first, again = (next(dataset.read(seed=0, epoch=3, start=5, stop=6)) for _ in range(2))
        >>> torch.equal(first["image"], again["image"])  # the position determines sample and crop
        True
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of listed samples, including corrupt ones."""

    @abstractmethod
    def records(
        self, *, seed: int | None, epoch: int, start: int, stop: int, skip: int = 0
    ) -> Iterator[Record | Skipped]:
        """Reads the records at positions ``start .. stop - 1``, with a `Skipped` for each one that cannot be read.

        Args:
            seed: Seed of the order; None for the stored order.
            epoch: Number of the pass over the data, which determines the order.
            start: First position.
            stop: Position after the last.
            skip: Number of listed records at the beginning of what is returned that are left out, without reading
                them, so that a resumed run continues within seconds. Defaults to 0.
        """

    @abstractmethod
    def item(self, record: Any, epoch: int) -> Item | Skipped:
        """Decodes a record of `records`; the epoch determines its crop and caption."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of what identifies the stored data."""

    def read(self, *, seed: int | None, epoch: int, start: int, stop: int) -> Iterator[Item | Skipped]:
        """Reads the items at positions ``start .. stop - 1`` of an epoch, with a `Skipped` for each unusable one.

        Args:
            seed: Seed of the order; None for the stored order.
            epoch: Number of the pass over the data, which determines order, crops and captions.
            start: First position.
            stop: Position after the last.
        """
        for record in self.records(seed=seed, epoch=epoch, start=start, stop=stop):
            yield record if isinstance(record, Skipped) else self.item(record, epoch)

    def __iter__(self) -> Iterator[Item]:
        """Reads the usable items of epoch 0 in stored order, and warns about each of the others."""
        worker = torch.utils.data.get_worker_info()
        part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        total, skipped, named = len(self), 0, set()
        start, stop = total * part // parts, total * (part + 1) // parts
        for record in self.read(seed=None, epoch=0, start=start, stop=stop):
            if isinstance(record, Skipped):
                skipped += 1
                if record.key not in named:  # a file has one key for all records that it lacks
                    log.warning("skipped %s", record)
                named.add(record.key)
            else:
                yield record
        if skipped:
            log.warning("skipped %d of %d samples", skipped, stop - start)


class ImageTextDataset(CaptionedDataset):
    """Images of a source, decoded, cropped and paired with one caption.

    Args:
        source: Source of the images, from `open_source`.
        transform: Name in `TRANSFORMS`: ``dvae``, ``prior``, ``center``.
        size: Side of the images, pixels.
        seed: Seed of crops and of the choice of captions.
        variants: Number of different crops per image: epoch e uses crop ``e % variants``. Defaults to a new crop in
            each epoch.
        caption: Which of several captions to use: the ``first``, or a ``random`` one in each epoch.
        needs_captions: Whether to skip samples without a caption; otherwise their caption is ``""``.
        layers: Image tokens in a row for which items get their layers, see `layers`; only for composed data. Defaults
            to none.

    Raises:
        ValueError: Layers are asked of images that are not composed, or that are changed after composing.

    Example:
        >>> from dalle_zoo.data import open_source
        >>> dataset = ImageTextDataset(open_source("composition:train"), transform="center", size=32)
        >>> len(dataset), next(iter(dataset))["image"].shape
        (20000, torch.Size([3, 32, 32]))
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        transform: str,
        size: int,
        seed: int = 0,
        variants: int | None = None,
        caption: str = "first",
        needs_captions: bool = True,
        layers: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(size=size)
        if layers is not None:
            check_positive(layers=layers)
            unchanged = size == SIZE and transform in ("prior", "center") and SIZE % layers == 0
            if not isinstance(source, CompositionSource) or not unchanged:
                raise ValueError(
                    f"layers exist only for composed data such as composition:train, with image_size {SIZE}, "
                    f"transform prior and a number of tokens that divides {SIZE}: set layers to false"
                )
        if variants is not None:  # None: a new crop each epoch
            check_positive(variants=variants)
        check_caption_choice(caption)
        self.source, self.size, self.seed = source, size, seed
        self.transform = TRANSFORMS[transform]
        self.variants, self.caption, self.needs_captions = variants, caption, needs_captions
        self.layers = layers

    def __len__(self) -> int:
        return self.source.num_samples

    def fingerprint(self) -> str:
        """SHA-256 of the names and sizes of the files of the source."""
        return self.source.fingerprint()

    def records(
        self, *, seed: int | None, epoch: int, start: int, stop: int, skip: int = 0
    ) -> Iterator[Sample | Skipped]:
        """See `CaptionedDataset.records`."""
        records = self.source.read(seed=seed, epoch=epoch, start=start, stop=stop, skip=skip)
        return map(captioned, records) if self.needs_captions else records

    def item(self, record: Sample, epoch: int) -> Item | Skipped:
        """See `CaptionedDataset.item`."""
        variant = epoch if self.variants is None else epoch % self.variants
        try:
            image = crop_of(record, self.transform, self.size, self.seed, variant)
        except CorruptImageError as error:
            return Skipped(record.key, str(error))
        caption = pick_caption(record.captions, self.caption, self.seed, record.key, epoch)
        item = {"key": record.key, "image": image, "caption": caption}
        if self.layers is not None and isinstance(record, ComposedSample):
            separate = record.layers(self.layers)
            item["layers"] = torch.from_numpy(separate.images.transpose(0, 3, 1, 2).copy())
            item["cells"] = torch.from_numpy(separate.cells)
            item["recolored"] = torch.from_numpy(separate.recolored)
        return item


def crop_of(sample: Sample, transform: Transform, size: int, seed: int, variant: int) -> Tensor:
    """Crops a sample to uint8 (3, size, size), identically for training and for code shards."""
    return transform(decode_image(sample.image), size, sample_rng(seed, sample.key, variant))


def pick_caption(captions: Sequence[str], choice: str, seed: int, key: str, epoch: int) -> str:
    """Chooses one of a sample's captions; ``""`` without one."""
    if not captions:
        return ""
    return captions[0] if choice == "first" else seeded_rng("caption", seed, key, epoch).choice(captions)
