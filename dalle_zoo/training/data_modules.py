"""Batches for the three stages: images, captioned images, or code shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch import Tensor

from dalle_zoo.data import CaptionedDataset, CodeDataset, Collate, ImageTextDataset, ResumableLoader, open_source
from dalle_zoo.sampling import derive_seed
from dalle_zoo.tokenizers import CaptionEncoder, TextTokenizer, load_text_tokenizer
from dalle_zoo.zoo import find_component


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How captions become ids."""

    tokenizer: str
    """Folder of a text tokenizer, or a model that has one."""
    length: int = 256
    """Text positions T."""
    bpe_dropout: float = 0.1
    """BPE dropout while training (10 % in the paper, footnote 5); 0 for tokenizers without it."""
    overlong: Literal["truncate", "error"] = "truncate"
    """What happens to captions of more than `length` tokens."""
    caption: Literal["first", "random"] = "random"
    """Which caption of several: always the first, or one sampled every epoch."""


class _Encode:
    """Captions to ids, seeded by (seed, key, epoch), picklable for loader workers."""

    def __init__(self, tokenizer: TextTokenizer, text: TextConfig, dropout: float, seed: int) -> None:
        self.encoder = CaptionEncoder(tokenizer, text.length, overlong=text.overlong, dropout=dropout)
        self.seed = seed

    def __call__(self, captions: Sequence[str], keys: Sequence[str], epoch: int) -> Tensor:
        seeds = [derive_seed(self.seed, "bpe", key, epoch) for key in keys]
        return self.encoder(captions, seeds)


class CaptionedDataModule(LightningDataModule, ABC):
    """What both kinds of data share: captions to ids, and loaders that resume.

    Args:
        train: Training data.
        val: Validation data.
        text: How captions become ids.
        batch_size: Samples a batch and process.
        num_workers: Loader processes.
        seed: Seed of order, crops, captions and BPE dropout.
    """

    def __init__(
        self, train: str, val: str | None, text: TextConfig | None, batch_size: int, num_workers: int, seed: int
    ) -> None:
        super().__init__()
        self.train, self.val, self.text = train, val, text
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.tokenizer = load_text_tokenizer(find_component(text.tokenizer, "tokenizer")) if text else None

    def check(self) -> None:
        """Opens everything once, so that a wrong location or size stops before anything is trained."""
        self.train_dataloader()
        self.val_dataloader()

    @abstractmethod
    def dataset(self, location: str, training: bool) -> CaptionedDataset:
        """Data of a location."""

    def _loader(self, location: str, training: bool) -> ResumableLoader:
        encode: _Encode | None = None
        if self.text is not None and self.tokenizer is not None:
            encode = _Encode(self.tokenizer, self.text, self.text.bpe_dropout if training else 0.0, self.seed)
        world = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        return ResumableLoader(
            self.dataset(location, training),
            self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers if training else 0,
            rank=rank,
            world_size=world,
            shuffle=training,
            drop_last=training,
            collate=Collate(encode),
        )

    def train_dataloader(self) -> Iterable[Any]:
        """Shuffled batches; the loader saves its place."""
        return self._loader(self.train, training=True)

    def val_dataloader(self) -> Iterable[Any]:
        """Batches in order, without augmentation."""
        return self._loader(self.val, training=False) if self.val else []

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


class ImageDataModule(CaptionedDataModule):
    """Images, with captions when ``text`` is given.

    Args:
        train: Training data: shards, a folder, or a bundled split such as "emoji64:train".
        val: Validation data, likewise.
        image_size: Side of the square images, pixels.
        transform: Preprocessing while training: "dvae" (Listing 1, flips) or "prior" (Listing 2); validation takes
            the center.
        text: How captions become ids; absent for stage 1.
        variants: Crops of an image repeat after so many epochs. Defaults to a new crop every epoch.
        batch_size: Samples a batch and process.
        num_workers: Loader processes.
        seed: Seed of order, crops, captions and BPE dropout.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        image_size: int = 256,
        transform: Literal["dvae", "prior"] = "prior",
        text: TextConfig | None = None,
        variants: int | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(train, val, text, batch_size, num_workers, seed)
        self.image_size, self.transform, self.variants = image_size, transform, variants
        self.check()

    def dataset(self, location: str, training: bool) -> ImageTextDataset:
        """Images of a location."""
        return ImageTextDataset(
            open_source(location),
            transform=self.transform if training else "center",
            size=self.image_size,
            seed=self.seed,
            variants=self.variants,
            caption=self.text.caption if self.text and training else "first",
            needs_captions=self.text is not None,
        )


class CodeDataModule(CaptionedDataModule):
    """Code shards written by ``dalle-zoo encode``.

    Args:
        train: Folder of training shards.
        val: Folder of validation shards.
        text: How captions become ids.
        batch_size: Samples a batch and process.
        num_workers: Loader processes.
        seed: Seed of order, captions and BPE dropout.
    """

    def __init__(
        self,
        train: str,
        text: TextConfig,
        val: str | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(train, val, text, batch_size, num_workers, seed)
        self.check()

    def dataset(self, location: str, training: bool) -> CodeDataset:
        """Codes of a folder of shards."""
        caption = self.text.caption if self.text and training else "first"
        return CodeDataset(location, caption=caption, seed=self.seed)
