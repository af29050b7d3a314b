"""The interface of all image tokenizers, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dalle_zoo.registry import Registry
from dalle_zoo.values import check_type

# B batch, C channels, H W image, h w code grid, K codebook size


class ImageTokenizer(nn.Module, ABC):
    """Maps images to a grid of codes and back. Stage 2 and sampling use only this interface.

    Example:
        >>> from dalle_zoo.models.dvae import DVAE, DVAEConfig
        >>> dvae = DVAE(DVAEConfig(image_size=32, width=8, num_groups=3, codebook_size=16, decoder_stem=8))
        >>> dvae.codebook_size, dvae.factor
        (16, 4)
        >>> dvae.check_codes(torch.tensor([[[3, 16]]]))
        Traceback (most recent call last):
        ValueError: codes must be in 0..15, got 3..16
    """

    config_class: ClassVar[type]
    """Frozen dataclass of the architecture; its fields are what ``config.json`` holds."""
    config: Any
    """Instance of `config_class`, with `codebook_size`, `factor` and `image_size` unless the class has them."""
    decodes: ClassVar[bool] = True
    """Whether codes can be decoded; otherwise `decode` raises `ValueError`."""

    @property
    def codebook_size(self) -> int:
        """Number of codes K; codes are 0 .. K - 1."""
        return int(self.config.codebook_size)

    @property
    def factor(self) -> int:
        """Pixels per code along one side."""
        return int(self.config.factor)

    @property
    def image_size(self) -> int:
        """Side of the square training images, pixels."""
        return int(self.config.image_size)

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Encodes images deterministically: pixels in [0, 1], (B, C, H, W) to codes, int64 (B, h, w)."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Decodes codes: int64 (B, h, w) to pixels in [0, 1], (B, C, H, W)."""

    def compile_networks(self, **options: Any) -> None:
        """Compiles the networks of `encode` and `decode` for a GPU; the first call of each is then slow.

        Args:
            options: Options of `torch.compile`.
        """
        for name in ("encoder", "decoder"):
            if hasattr(self, name):
                getattr(self, name).compile(**options)

    @property
    def grid_size(self) -> int:
        """Codes along one side of an image of `image_size`."""
        return self.image_size // self.factor

    def check_images(self, images: Tensor) -> None:
        """Raises `ValueError` unless the images are (B, C, H, W) floats with sides that the factor divides."""
        check_type("images", images, Tensor, "a tensor")
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                f"images must be floats of shape (B, C, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}"
            )
        if images.shape[-2] % self.factor or images.shape[-1] % self.factor:
            raise ValueError(
                f"image sides must be multiples of {self.factor}, got {tuple(images.shape[-2:])}: resize or crop first"
            )

    def check_codes(self, codes: Tensor) -> None:
        """Raises `ValueError` unless the codes are integers of shape (B, h, w) below the codebook size."""
        check_type("codes", codes, Tensor, "a tensor")
        if codes.ndim != 3 or codes.is_floating_point():
            raise ValueError(f"codes must be integers of shape (B, h, w), got {codes.dtype} {tuple(codes.shape)}")
        if not codes.numel():
            return
        least, most = torch.stack(codes.aminmax()).tolist()  # read together: each read waits for a GPU
        if least < 0 or most >= self.codebook_size:
            raise ValueError(f"codes must be in 0..{self.codebook_size - 1}, got {least}..{most}")


IMAGE_TOKENIZERS: Registry[type[ImageTokenizer]] = Registry(
    "image tokenizer", group="dalle_zoo.image_tokenizers", base=ImageTokenizer
)
