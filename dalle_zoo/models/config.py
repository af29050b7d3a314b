"""The config fields that all priors share."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_zoo.masks import TextImageLayout
from dalle_zoo.values import check_integers


@dataclass(frozen=True, kw_only=True)
class ImagePriorConfig:
    """Sizes of a prior over text and image tokens; the base of every prior's config."""

    text_length: int
    """Text positions T."""
    text_vocab: int
    """Text vocabulary V."""
    image_height: int
    """Rows of the code grid."""
    image_width: int
    """Columns of the code grid."""
    codebook_size: int
    """Image vocabulary K."""
    width: int
    """Model width d."""

    def __post_init__(self) -> None:
        self.check_positive("text_length", "text_vocab", "image_height", "image_width", "codebook_size", "width")

    def check_positive(self, *names: str) -> None:
        """Raises `TypeError` or `ValueError` unless the named fields are integers of at least 1."""
        check_integers(self, *names)

    def check_heads(self, name: str = "num_heads") -> None:
        """Raises `ValueError` unless the named number of attention heads is positive and divides the width."""
        self.check_positive(name)
        if self.width % getattr(self, name):
            raise ValueError(f"width {self.width} is not a multiple of {name} {getattr(self, name)}")

    @property
    def layout(self) -> TextImageLayout:
        """Positions of text and image in the stream."""
        return TextImageLayout(self.text_length, self.image_height, self.image_width)

    @property
    def image_length(self) -> int:
        """Image positions N."""
        return self.image_height * self.image_width
