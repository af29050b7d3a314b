"""Data modules of the training stages: images, captioned images, or code shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch import Tensor

from dalle_zoo.data import CaptionedDataset, CodeDataset, Collate, ImageTextDataset, ResumableLoader, open_source
from dalle_zoo.sampling import derive_seed
from dalle_zoo.tokenizers import CaptionEncoder, TextTokenizer
from dalle_zoo.zoo import open_text_tokenizer


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How captions are encoded as token ids."""

    tokenizer: str
    """Folder of a text tokenizer, a model that has one, or "byte", which needs no training."""
    length: int = 256
    """Text positions T."""
    bpe_dropout: float = 0.1
    """BPE dropout during training (10 % in the paper, footnote 5); 0 for tokenizers without it."""
    overlong: Literal["truncate", "error"] = "truncate"
    """What to do with captions of more than `length` tokens."""
    caption: Literal["first", "random"] = "random"
    """Which of several captions to use: always the first, or one sampled in every epoch."""


class _Encode:
    """Encodes captions as ids, seeded by (seed, key, epoch); picklable for loader workers."""

    def __init__(self, tokenizer: TextTokenizer, text: TextConfig, dropout: float, seed: int) -> None:
        self.encoder = CaptionEncoder(tokenizer, text.length, overlong=text.overlong, dropout=dropout)
        self.seed = seed

    def __call__(self, captions: Sequence[str], keys: Sequence[str], epoch: int) -> Tensor:
        seeds = [derive_seed(self.seed, "bpe", key, epoch) for key in keys]
        return self.encoder(captions, seeds)


class CaptionedDataModule(LightningDataModule, ABC):
    """Base of the data modules: encodes captions, and gives loaders that resume.

    The constructor only stores its arguments. `setup` opens the tokenizer and the data, as Lightning expects, in
    every process.

    Args:
        train: Location of the training data.
        val: Location of the validation data. Defaults to none.
        text: How captions are encoded; None leaves them out.
        batch_size: Samples per batch and process.
        num_workers: Loader processes. 0 loads in the training process.
        seed: Seed of order, crops, captions and BPE dropout.
    """

    def __init__(
        self, train: str, val: str | None, text: TextConfig | None, batch_size: int, num_workers: int, seed: int
    ) -> None:
        super().__init__()
        self.train, self.val, self.text = train, val, text
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.tokenizer: TextTokenizer | None = None
        self.opened: dict[str, CaptionedDataset] = {}
        """Open data by the split, "train" or "val"."""

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokenizer and the data that a trainer command needs; opens nothing twice.

        Args:
            stage: "fit", "validate", "test" or "predict": all but "fit" open the validation data only. Defaults to
                opening everything.

        Raises:
            ValueError: A location is wrong, or the data are too few for a batch on every rank.
        """
        if self.text is not None and self.tokenizer is None:
            self.tokenizer = open_text_tokenizer(self.text.tokenizer)
        locations = {"train": self.train if stage in (None, "fit") else None, "val": self.val}
        for split, location in locations.items():
            if location is not None and split not in self.opened:
                self.opened[split] = self.dataset(location, training=split == "train")
            if split in self.opened:
                self._loader(split)  # raises for data that give no batch

    @abstractmethod
    def dataset(self, location: str, training: bool) -> CaptionedDataset:
        """Opens the data of a location, with or without random crops and captions."""

    def _loader(self, split: str) -> ResumableLoader:
        training = split == "train"
        encode: _Encode | None = None
        if self.text is not None and self.tokenizer is not None:
            encode = _Encode(self.tokenizer, self.text, self.text.bpe_dropout if training else 0.0, self.seed)
        world = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        return ResumableLoader(
            self.opened[split],
            self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers if training else 0,
            rank=rank,
            world_size=world,
            shuffle=training and not self._repeats,
            drop_last=training,
            collate=Collate(encode),
            limit=(getattr(self.trainer, "limit_train_batches", None) or None) if training else None,
        )

    @property
    def _repeats(self) -> bool:
        """Whether every epoch has the same batches, as with the trainer's ``overfit_batches``."""
        return bool(getattr(self.trainer, "overfit_batches", 0))

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the open data and of the tokenizer, by the recipe key that names them."""
        found = {f"data.{split}": dataset.fingerprint() for split, dataset in self.opened.items()}
        if self.tokenizer is not None:
            found["data.text.tokenizer"] = self.tokenizer.fingerprint()
        return found

    def train_dataloader(self) -> Iterable[Any]:
        """Returns shuffled batches; the loader saves its position."""
        return self._loader("train")

    def val_dataloader(self) -> Iterable[Any]:
        """Returns batches in stored order, without augmentation; none without validation data."""
        return self._loader("val") if self.val else []

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


class ImageDataModule(CaptionedDataModule):
    """Images, with captions when ``text`` is given.

    Args:
        train: Training data: shards, a folder, or a bundled split such as "emoji64:train".
        val: Validation data, likewise. Defaults to none.
        image_size: Side of the square images, pixels.
        transform: Preprocessing during training, a name in `TRANSFORMS`: "dvae" (Listing 1, with flips) or "prior"
            (Listing 2); validation takes the center crop. Defaults to "prior".
        text: How captions are encoded. Defaults to no captions, as stage 1 needs none.
        variants: Number of different crops per image; epoch e takes crop ``e % variants``. Defaults to a new crop
            every epoch.
        batch_size: Samples per batch and process.
        num_workers: Loader processes. 0 loads in the training process.
        seed: Seed of order, crops, captions and BPE dropout.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        image_size: int = 256,
        transform: str = "prior",
        text: TextConfig | None = None,
        variants: int | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(train, val, text, batch_size, num_workers, seed)
        self.image_size, self.transform, self.variants = image_size, transform, variants

    def dataset(self, location: str, training: bool) -> ImageTextDataset:
        """Opens the images of a location."""
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
        text: How captions are encoded.
        val: Folder of validation shards. Defaults to none.
        batch_size: Samples per batch and process.
        num_workers: Loader processes. 0 loads in the training process.
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

    def dataset(self, location: str, training: bool) -> CodeDataset:
        """Opens a folder of code shards."""
        caption = self.text.caption if self.text and training else "first"
        return CodeDataset(location, caption=caption, seed=self.seed)
