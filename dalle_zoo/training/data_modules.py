"""Data modules of the training stages: images, captioned images, or code shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch import Tensor

from dalle_zoo.composition.sprites import SpriteSet
from dalle_zoo.data import CaptionedDataset, CodeDataset, Collate, ImageTextDataset, ResumableLoader, open_source
from dalle_zoo.data.composition import CompositionSource
from dalle_zoo.sampling import derive_seed
from dalle_zoo.tokenizers import CaptionEncoder, TextTokenizer
from dalle_zoo.tokenizers.captions import Overlong
from dalle_zoo.zoo import open_text_tokenizer


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How captions are encoded as token ids."""

    tokenizer: str | None = None
    """Folder of a text tokenizer, a model that has one, or "byte", which needs no training. Defaults to that of the
    model that training starts from."""
    length: int | None = None
    """Text positions T. Defaults to those of the prior that is trained, to 256 for other stages."""
    bpe_dropout: float = 0.1
    """BPE dropout during training (10 % in the paper, footnote 5); 0 for tokenizers without it."""
    overlong: Overlong = "truncate"
    """What to do with captions of more than `length` tokens."""
    caption: Literal["first", "random"] = "random"
    """Which of several captions to use: always the first, or one sampled in every epoch."""


MakeEncoder = Callable[[TextTokenizer, Overlong, float], CaptionEncoder]
"""Makes the encoder of captions from a tokenizer, what to do with overlong captions, and BPE dropout."""

LENGTH, SIZE = 256, 256
"""Text positions, and side of images in pixels, where no stage states its own: the paper's."""


class _Encode:
    """Encodes captions as ids, seeded by (seed, key, epoch); picklable for loader workers."""

    def __init__(self, encoder: CaptionEncoder, seed: int) -> None:
        self.encoder = encoder
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
        self.make_encoder: MakeEncoder | None = None
        self.opened: dict[str, CaptionedDataset] = {}
        """Open data by the split, "train" or "val"."""

    def complete(self, tokenizer: str | None, length: int, make_encoder: MakeEncoder) -> None:
        """Takes what the recipe leaves out from the network that is trained.

        Args:
            tokenizer: Folder of the text tokenizer that the network was trained with; None if there is none yet.
            length: Text positions of the network.
            make_encoder: Makes the network's encoder of captions.
        """
        if self.text is not None:
            text = self.text
            self.text = replace(text, tokenizer=text.tokenizer or tokenizer, length=text.length or length)
            self.make_encoder = make_encoder

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokenizer and the data that a trainer command needs; opens nothing twice.

        Args:
            stage: "fit", "validate", "test" or "predict": all but "fit" open the validation data only. Defaults to
                opening everything.

        Raises:
            ValueError: A location is wrong, or the data are too few for a batch on every rank.
        """
        if self.text is not None and self.tokenizer is None:
            if self.text.tokenizer is None:
                raise ValueError(
                    "data.init_args.text.tokenizer is missing: set it to a folder or a model, or start from a model "
                    "that has one with model.init_args.init_from"
                )
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
            dropout = self.text.bpe_dropout if training else 0.0
            encode = _Encode(self._encoder(self.tokenizer, self.text, dropout), self.seed)
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

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Encodes captions as those of validation: int64 (B, T). `setup` comes first."""
        assert self.tokenizer is not None
        assert self.text is not None
        return self._encoder(self.tokenizer, self.text, dropout=0.0)(captions)

    def _encoder(self, tokenizer: TextTokenizer, text: TextConfig, dropout: float) -> CaptionEncoder:
        if self.make_encoder is not None:
            return self.make_encoder(tokenizer, text.overlong, dropout)
        return CaptionEncoder(tokenizer, text.length or LENGTH, text.overlong, dropout)

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
        train: Training data: shards, a folder, or a bundled split such as "composition:train".
        val: Validation data, likewise. Defaults to none.
        image_size: Side of the square images, pixels. Defaults to that of the network, to 256 if it takes any.
        transform: Preprocessing during training, a name in `TRANSFORMS`: "dvae" (Listing 1, with flips) or "prior"
            (Listing 2); validation takes the center crop. Defaults to "prior".
        text: How captions are encoded. Defaults to no captions, as stage 1 needs none.
        variants: Number of different crops per image; epoch e takes crop ``e % variants``. Defaults to a new crop
            every epoch.
        batch_size: Samples per batch and process.
        num_workers: Loader processes. 0 loads in the training process.
        seed: Seed of order, crops, captions and BPE dropout.
        layers: Whether the image tokens of a thing are those of the thing alone, on any ground and next to any other
            thing; only for composed data. Defaults to those of the whole image.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        image_size: int | None = None,
        transform: str = "prior",
        text: TextConfig | None = None,
        variants: int | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        layers: bool = False,
    ) -> None:
        super().__init__(train, val, text, batch_size, num_workers, seed)
        self.image_size, self.transform, self.variants, self.layers = image_size, transform, variants, layers
        self.grid_size: int | None = None  # image tokens in a row; the module sets it before `setup`

    def dataset(self, location: str, training: bool) -> ImageTextDataset:
        """Opens the images of a location."""
        if self.layers and self.grid_size is None:
            raise ValueError(
                "data.init_args.layers is for networks with image tokens, a dVAE or a prior: set it to false"
            )
        return ImageTextDataset(
            open_source(location),
            transform=self.transform if training else "center",
            size=self.image_size or SIZE,
            seed=self.seed,
            variants=self.variants,
            caption=self.text.caption if self.text and training else "first",
            needs_captions=self.text is not None,
            layers=self.grid_size if self.layers else None,
        )

    @property
    def sprites(self) -> SpriteSet:
        """Sprites of composed data, those of training if it was opened; `setup` comes first."""
        sources = (data.source for data in self.opened.values() if isinstance(data, ImageTextDataset))
        return next(source.sprites for source in sources if isinstance(source, CompositionSource))


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
