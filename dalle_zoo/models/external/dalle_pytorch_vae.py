"""DALLE-pytorch's own discrete VAE: a few strided convolutions, residual blocks without normalization, a codebook.

```
image (B, 3, H, W) ─► encoder ─► logits (B, K, h, w) ─► codes (B, h, w) ─► codebook entries (B, D, h, w) ─► decoder
```
The names in the state dict are those of the original's checkpoints. Only inference is supported, so there is no
relaxation.

Reference: https://github.com/lucidrains/DALLE-pytorch; its names are in brackets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dalle_zoo.models.tokenizer import IMAGE_TOKENIZERS, ImageTokenizer
from dalle_zoo.values import check_integers

# B batch, H W image, h w code grid, K codebook size, D dimension of a codebook entry, C width

COLORS = 3
PIXEL_MEAN = PIXEL_STD = 0.5
"""Mean and standard deviation of every color: inputs and outputs are (pixel - mean) / std [normalization]."""


@dataclass(frozen=True, kw_only=True)
class DallePytorchVAEConfig:
    """Architecture of DALLE-pytorch's discrete VAE; defaults are those of the original."""

    image_size: int = 256
    """Side of the square training images, pixels. The network takes any multiple of the factor."""
    num_layers: int = 3
    """Convolutions that halve the resolution [num_layers]."""
    num_blocks: int = 0
    """Residual blocks at the resolution of the codes, in the encoder and in the decoder [num_resnet_blocks]."""
    width: int = 64
    """Channels C at all resolutions [hidden_dim]."""
    code_channels: int = 512
    """Dimension D of a codebook entry [codebook_dim]."""
    codebook_size: int = 512
    """Number of codes K [num_tokens]."""

    def __post_init__(self) -> None:
        check_integers(self, "image_size", "num_layers", "width", "code_channels")
        check_integers(self, "num_blocks", least=0)
        check_integers(self, "codebook_size", least=2)
        if self.image_size % self.factor:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of the downsampling factor {self.factor}: "
                f"choose another image_size or num_layers"
            )

    @property
    def factor(self) -> int:
        """Pixels per code along one side."""
        return 1 << self.num_layers


class ResidualBlock(nn.Module):
    """``x + branch(x)``; the branch has 3x3, 3x3 and 1x1 convolutions with ReLUs between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape (B, C, H, W)."""
        out: Tensor = x + self.net(x)
        return out


def _encoder(c: DallePytorchVAEConfig) -> nn.Sequential:
    inputs = [COLORS, *[c.width] * (c.num_layers - 1)]
    halve = [nn.Sequential(nn.Conv2d(i, c.width, 4, stride=2, padding=1), nn.ReLU()) for i in inputs]
    blocks = [ResidualBlock(c.width) for _ in range(c.num_blocks)]
    return nn.Sequential(*halve, *blocks, nn.Conv2d(c.width, c.codebook_size, 1))


def _decoder(c: DallePytorchVAEConfig) -> nn.Sequential:
    # Without residual blocks, the input of the first transposed convolution is the codebook entries themselves.
    stem = [nn.Conv2d(c.code_channels, c.width, 1)] if c.num_blocks else []
    blocks = [ResidualBlock(c.width) for _ in range(c.num_blocks)]
    inputs = [c.width if c.num_blocks else c.code_channels, *[c.width] * (c.num_layers - 1)]
    double = [nn.Sequential(nn.ConvTranspose2d(i, c.width, 4, stride=2, padding=1), nn.ReLU()) for i in inputs]
    return nn.Sequential(*stem, *blocks, *double, nn.Conv2d(c.width, COLORS, 1))


@IMAGE_TOKENIZERS.register("dalle_pytorch_vae")
class DallePytorchVAE(ImageTokenizer):
    """DALLE-pytorch's own discrete VAE.

    The original's script stretches the contrast of every decoded image to the full range. Here the normalization is
    inverted instead, so that a decoded image has the colors of the encoded one.

    Args:
        config: Architecture.

    Example:
        >>> vae = DallePytorchVAE(DallePytorchVAEConfig(image_size=32, width=8, code_channels=8, codebook_size=16))
        >>> codes = vae.encode(torch.rand(2, 3, 32, 32))
        >>> codes.shape, vae.decode(codes).shape
        (torch.Size([2, 4, 4]), torch.Size([2, 3, 32, 32]))
    """

    config_class = DallePytorchVAEConfig
    config: DallePytorchVAEConfig

    def __init__(self, config: DallePytorchVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook = nn.Embedding(config.codebook_size, config.code_channels)
        self.encoder, self.decoder = _encoder(config), _decoder(config)

    def encode(self, images: Tensor) -> Tensor:
        """Most likely codes: pixels in [0, 1], (B, 3, H, W) to int64 (B, h, w)."""
        self.check_images(images)
        if images.shape[1] != COLORS:
            raise ValueError(f"images must have {COLORS} channels, got shape {tuple(images.shape)}")
        with torch.autocast(images.device.type, enabled=False):  # rounding can change the argmax
            logits: Tensor = self.encoder((images.float() - PIXEL_MEAN) / PIXEL_STD)
        return logits.argmax(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes: int64 (B, h, w) to pixels in [0, 1], (B, 3, H, W)."""
        self.check_codes(codes)
        entries: Tensor = self.codebook(codes)
        pixels: Tensor = self.decoder(entries.movedim(-1, 1)).float()
        return (pixels * PIXEL_STD + PIXEL_MEAN).clamp(0, 1)
