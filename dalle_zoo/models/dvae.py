"""Discrete VAE: images to a grid of codes and back.

The network of appendix A of the paper, at any size: a convolutional encoder without normalization layers
computes K logits for every cell of a coarse grid, and a mirrored decoder maps (soft) one-hot cells back to pixels.

```
image (B, 3, H, W) ─► Encoder ─► logits (B, K, h, w) ─argmax─► codes (B, h, w)
                                     │ training: Gumbel-softmax, a soft mixture
                                     ▼
                     Decoder ◄─ one-hot or soft cells (B, K, h, w)
                        └─► location and log-scale of the logit-Laplace, (B, 6, H, W)
```
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo.models.dvae_networks import Decoder, DVAEConfig, DVAEEncoderConfig, Encoder, num_per_pass
from dalle_zoo.models.layers import gumbel_noise
from dalle_zoo.models.tokenizer import IMAGE_TOKENIZERS, ImageTokenizer

__all__ = ["DVAE", "DVAEConfig", "DVAEEncoder", "DVAEEncoderConfig"]

# B batch, C channels, H W image, h w code grid (H / factor, W / factor), K codebook size


class EncodingTokenizer(ImageTokenizer):
    """Encodes images to codes; shared by the complete network and the encoder without a decoder."""

    config: DVAEEncoderConfig

    def __init__(self, config: DVAEEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)

    def map_pixels(self, images: Tensor) -> Tensor:
        """Maps pixels from [0, 1] to [eps, 1 - eps], where the logit is finite (appendix A.3)."""
        return images * (1 - 2 * self.config.pixel_eps) + self.config.pixel_eps

    def check_images(self, images: Tensor) -> None:
        """Like `ImageTokenizer.check_images`, and checks the number of channels."""
        super().check_images(images)
        if images.shape[1] != self.config.channels:
            raise ValueError(f"images must have {self.config.channels} channels, got shape {tuple(images.shape)}")

    def compile_networks(self, **options: Any) -> None:
        """Like `ImageTokenizer.compile_networks`; one graph per block would exceed torch's limit of 8."""
        self.encoder.features = torch.compile(self.encoder.features, **options)  # type: ignore[method-assign]

    def logits(self, images: Tensor) -> Tensor:
        """Unnormalized log-probabilities of the codes: pixels in [0, 1], (B, C, H, W) to (B, K, h, w)."""
        self.check_images(images)
        logits: Tensor = self.encoder(self.map_pixels(images))
        return logits

    def encode(self, images: Tensor) -> Tensor:
        """Most likely codes, without noise, as stage 2 is trained (2.2): (B, C, H, W) to int64 (B, h, w)."""
        self.check_images(images)
        return self.encoder.codes(self.map_pixels(images))


@IMAGE_TOKENIZERS.register("dvae_encoder")
class DVAEEncoder(EncodingTokenizer):
    """The encoder of a discrete VAE without a decoder, as some are published: it encodes images only.

    Args:
        config: Architecture.

    Example:
        >>> encoder = DVAEEncoder(DVAEEncoderConfig(image_size=32, width=8, num_groups=3, codebook_size=16))
        >>> encoder.encode(torch.rand(2, 3, 32, 32)).shape, encoder.decodes
        (torch.Size([2, 8, 8]), False)
    """

    config_class = DVAEEncoderConfig
    decodes = False

    def decode(self, codes: Tensor) -> Tensor:
        """Raises `ValueError`: there is no decoder."""
        raise ValueError(
            "this image tokenizer has only an encoder and cannot decode codes to images: load one that was "
            "converted with its decoder"
        )


@IMAGE_TOKENIZERS.register("dvae")
class DVAE(EncodingTokenizer):
    """The discrete VAE: encoder, Gumbel-softmax relaxation and decoder.

    Reference: Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), section 2.1 and appendix A.

    Args:
        config: Architecture; the defaults are the paper's 97.6 million parameters.

    Example:
        >>> dvae = DVAE(DVAEConfig(image_size=32, width=8, num_groups=3, codebook_size=16, decoder_stem=8))
        >>> codes = dvae.encode(torch.rand(2, 3, 32, 32))
        >>> codes.shape, dvae.decode(codes).shape
        (torch.Size([2, 8, 8]), torch.Size([2, 3, 32, 32]))
    """

    config_class = DVAEConfig
    config: DVAEConfig

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config)

    def compile_networks(self, **options: Any) -> None:
        """Like `EncodingTokenizer.compile_networks`, and compiles the decoder."""
        super().compile_networks(**options)
        self.decoder.from_stem = torch.compile(self.decoder.from_stem, **options)  # type: ignore[method-assign]

    def unmap_pixels(self, values: Tensor) -> Tensor:
        """Inverse of `map_pixels`, clamped to [0, 1]."""
        return ((values - self.config.pixel_eps) / (1 - 2 * self.config.pixel_eps)).clamp(0, 1)

    def relax(self, logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
        """Gumbel-softmax without straight-through: softmax((logits + g) / temperature) (section 2.1).

        Args:
            logits: Code logits, (B, K, h, w).
            temperature: Relaxation temperature tau, above 0.
            generator: Source of the noise. Defaults to the global one.

        Returns:
            Soft cells, (B, K, h, w), summing to one over K.
        """
        if not temperature > 0:  # at 0 the quotient would be NaN
            raise ValueError(f"temperature must be above 0, got {temperature}: anneal towards it, as to 1/16")
        return F.softmax((logits + gumbel_noise(logits, generator)) / temperature, dim=1)

    def forward(
        self, images: Tensor, temperature: float, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Training pass.

        Args:
            images: Pixels in [0, 1], (B, C, H, W).
            temperature: Relaxation temperature tau.
            generator: Source of the Gumbel noise.

        Returns:
            Pixel distribution parameters (B, 2C, H, W) and code logits (B, K, h, w).
        """
        logits = self.logits(images)
        return self.decoder(self.relax(logits, temperature, generator)), logits

    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes: int64 (B, h, w) to pixels in [0, 1], (B, C, H, W)."""
        self.check_codes(codes)
        if torch.is_grad_enabled():
            return self.pixels(self.decoder.from_codes(codes))
        factor = self.config.factor
        height, width = codes.shape[-2] * factor, codes.shape[-1] * factor
        parts = torch.split(codes, num_per_pass(codes.device, self.config.width, height, width))
        decode = self.decoder.code_decoder(codes)
        return torch.cat([self.pixels(decode(part)) for part in parts])

    def pixels(self, parameters: Tensor) -> Tensor:
        """Image from the locations of a predicted distribution: (B, 2C, H, W) to pixels in [0, 1], (B, C, H, W)."""
        return self.unmap_pixels(torch.sigmoid(parameters[:, : self.config.channels]))
