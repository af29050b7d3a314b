"""An attention mask, a text tokenizer and an image tokenizer from outside dalle-zoo."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from dalle_zoo.masks import MaskMod, TextImageLayout, text_then_image
from dalle_zoo.models.tokenizer import ImageTokenizer
from dalle_zoo.tokenizers import TextTokenizer


def diagonal(layout: TextImageLayout, *, steps: int = 1) -> MaskMod:
    """Attends to itself and to cells up to `steps` rows above, one column further left per row."""

    def image_rule(query: Tensor, key: Tensor) -> Tensor:
        offset = query - key
        return (offset % (layout.width + 1) == 0) & (offset <= steps * (layout.width + 1))

    return text_then_image(layout, image_rule)


LETTERS = string.ascii_lowercase + " "


class LetterTokenizer(TextTokenizer):
    """Ids 0 to 25 are the letters a to z and 26 is the space; other characters are dropped."""

    kind = "letters"
    vocab_size = 27

    def encode(self, text: str, *, dropout: float = 0.0, seed: int = 0) -> list[int]:
        self.check(text, dropout, seed)
        return [LETTERS.index(letter) for letter in text.lower() if letter in LETTERS]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(LETTERS[i] for i in self.known_ids(ids))

    def files(self) -> Mapping[str, str]:
        return {}

    @classmethod
    def read(cls, folder: Path) -> Self:
        return cls()


@dataclass(frozen=True, kw_only=True)
class BrightnessConfig:
    """Options of `BrightnessTokenizer`."""

    codebook_size: int = 16
    factor: int = 8
    image_size: int = 32


class BrightnessTokenizer(ImageTokenizer):
    """Each code is the brightness of a square of `factor` x `factor` pixels."""

    config_class = BrightnessConfig

    def __init__(self, config: BrightnessConfig) -> None:
        super().__init__()
        self.config = config

    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images)
        gray = avg_pool2d(images.mean(1), self.factor)
        return (gray * (self.codebook_size - 1)).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        gray = codes[:, None].expand(-1, 3, -1, -1) / (self.codebook_size - 1)
        return interpolate(gray, scale_factor=self.factor)


class NoTokenizer:
    """Registered, but derives from nothing."""
