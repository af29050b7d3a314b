"""VQGAN: images to a grid of codes and back, the autoencoder that most open text-to-image priors were trained on.

A convolutional encoder with residual blocks, group normalization and attention at coarse resolutions computes one
vector per cell, the quantizer replaces it by an entry of the codebook, and a mirrored decoder maps entries to pixels.

```
image (B, 3, H, W) ─► encoder ─► quant_conv ─► vectors (B, D, h, w) ─► quantize ─► codes (B, h, w)
                                                                          │
                      decoder ◄─ post_quant_conv ◄─ codebook entries (B, D, h, w)
                         └─► image (B, 3, H, W)
```

The names in the state dict are those of released checkpoints. Only inference is supported, so there is no adversarial
loss.

Reference: Taming Transformers for High-Resolution Image Synthesis (Esser et al., 2021), arXiv 2012.09841.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.models.tokenizer import IMAGE_TOKENIZERS, ImageTokenizer
from dalle_zoo.values import check_integers

# B batch, C channels, H W image, h w code grid, K codebook size, D dimension of a codebook entry

NORM_GROUPS = 32
NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Architecture of a VQGAN; defaults are the ImageNet model f16-16384. Released names are in brackets."""

    image_size: int = 256
    """Side of the square training images, pixels [resolution]. The network takes any multiple of the factor."""
    channels: int = 3
    """Image channels [in_channels, out_ch]."""
    width: int = 128
    """Base number of channels [ch]."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width of each level, finest first, as a multiple of ``width`` [ch_mult]. Resolution halves between levels."""
    blocks_per_level: int = 2
    """Residual blocks per level of the encoder; a level of the decoder has one more [num_res_blocks]."""
    attention_sizes: tuple[int, ...] = (16,)
    """Levels with attention after every block, given by their resolution for ``image_size`` [attn_resolutions]."""
    latent_channels: int = 256
    """Channels between the networks and the 1x1 convolutions around the quantizer [z_channels]."""
    code_channels: int = 256
    """Dimension D of a codebook entry [embed_dim]."""
    codebook_size: int = 16384
    """Number of codes K [n_embed]."""
    quantizer: Literal["nearest", "gumbel"] = "nearest"
    """``nearest``: the nearest entry of the codebook; ``gumbel``: the largest of K logits."""
    signed_pixels: bool = True
    """Whether the networks use pixels in [-1, 1], as in the original; those of dalle-mini use [0, 1]."""
    wavelet: bool = False
    """Whether the decoder outputs the four bands of a Haar wavelet for images of twice the size (ruDALL-E)."""
    decoder_only: bool = False
    """Whether there is only a decoder, so that images cannot be encoded (min-dalle's detokenizer)."""

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention_sizes"):  # lists in a JSON file
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_integers(self, "image_size", "channels", "width", "blocks_per_level", "latent_channels", "code_channels")
        check_integers(self, "codebook_size", least=2)
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, got {self.quantizer!r}")
        if not self.multipliers or any(width < 1 or width % NORM_GROUPS for width in self.widths):
            raise ValueError(
                f"every level needs a multiple of {NORM_GROUPS} channels (the groups of its normalization), "
                f"got width {self.width} with multipliers {self.multipliers}"
            )
        if self.image_size % self.factor:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of the downsampling factor {self.factor}: "
                f"choose another image_size or number of multipliers"
            )
        if unknown := set(self.attention_sizes) - set(self.level_sizes):
            raise ValueError(
                f"attention_sizes must be among the level sizes {self.level_sizes}, got {sorted(unknown)}"
            )

    @property
    def widths(self) -> list[int]:
        """Channels of the levels, finest resolution first."""
        return [self.width * multiplier for multiplier in self.multipliers]

    @property
    def factor(self) -> int:
        """Pixels per code along one side."""
        return (2 if self.wavelet else 1) << (len(self.multipliers) - 1)

    @property
    def level_sizes(self) -> list[int]:
        """Resolutions of the levels for an image of ``image_size``, finest first."""
        finest = self.image_size // (2 if self.wavelet else 1)
        return [finest >> level for level in range(len(self.multipliers))]

    @property
    def attention(self) -> list[bool]:
        """Whether the levels have attention, finest first."""
        return [size in self.attention_sizes for size in self.level_sizes]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class ResidualBlock(nn.Module):
    """``skip(x) + branch(x)``; the branch has norm, swish and 3x3 convolution, twice."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = _norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut: nn.Module = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        out: Tensor = self.nin_shortcut(x) + y
        return out


class Attention(nn.Module):
    """Self-attention over all cells with one head and a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape (B, C, H, W)."""
        y = self.norm(x)
        q, k, v = (conv(y).flatten(2).mT for conv in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
        out: Tensor = x + self.proj_out(y)
        return out


class Downsample(nn.Module):
    """Halves the resolution by a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 2h, 2w) to (B, C, h, w)."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))  # pads only right and bottom, as released weights expect
        return out


class Upsample(nn.Module):
    """Doubles the resolution by repeating pixels, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, 2h, 2w)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return out


class Level(nn.Module):
    """Blocks of one resolution: residual blocks, each optionally followed by attention, then a resize."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, attention: bool, *, down: bool = False, up: bool = False
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(outputs) if attention else nn.Identity() for _ in range(blocks))
        self.downsample: nn.Module = Downsample(outputs) if down else nn.Identity()
        self.upsample: nn.Module = Upsample(outputs) if up else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W), or half or twice that resolution."""
        for block, attention in zip(self.block, self.attn, strict=True):
            x = attention(block(x))
        out: Tensor = self.upsample(self.downsample(x))
        return out


def _middle(channels: int) -> nn.Sequential:
    parts = [("block_1", ResidualBlock(channels, channels)), ("attn_1", Attention(channels))]
    return nn.Sequential(OrderedDict([*parts, ("block_2", ResidualBlock(channels, channels))]))


class Encoder(nn.Module):
    """Maps images to one vector per cell, the input of the 1x1 convolution before the quantizer."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.channels, config.width, 3, padding=1)
        self.down = nn.ModuleList(
            Level(inputs, outputs, config.blocks_per_level, attention, down=level + 1 < len(widths))
            for level, (inputs, outputs, attention) in enumerate(
                zip([config.width, *widths[:-1]], widths, config.attention, strict=True)
            )
        )
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Pixels in the network's range, (B, C, H, W), to (B, latent channels, h, w)."""
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Decoder(nn.Module):
    """Maps one vector per cell to pixels, or to the four bands of a wavelet."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1])
        self.up = nn.ModuleList(  # finest level first, as in the encoder; runs in reverse
            Level(inputs, outputs, config.blocks_per_level + 1, attention, up=level > 0)
            for level, (inputs, outputs, attention) in enumerate(
                zip([*widths[1:], widths[-1]], widths, config.attention, strict=True)
            )
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.channels * (4 if config.wavelet else 1), 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, latent channels, h, w) to pixels in the network's range, (B, C, H, W), or bands (B, 4C, H/2, W/2)."""
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class NearestQuantizer(nn.Module):
    """Vector quantizer: replaces a vector by the nearest entry of the codebook."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.code_channels)
        nn.init.uniform_(self.embedding.weight, -1 / config.codebook_size, 1 / config.codebook_size)

    def codes(self, vectors: Tensor) -> Tensor:
        """Nearest entries: (B, D, h, w) to int64 (B, h, w)."""
        entries = self.embedding.weight.float()
        # |v - e|^2 = |v|^2 - 2 v.e + |e|^2, whose first term is the same for all entries
        products = vectors.float().movedim(1, -1) @ entries.T
        return (entries.square().sum(1) - 2 * products).argmin(-1)

    def forward(self, codes: Tensor) -> Tensor:
        """Entries of codes: int64 (B, h, w) to (B, D, h, w)."""
        entries: Tensor = self.embedding(codes)
        return entries.movedim(-1, 1)


class GumbelQuantizer(nn.Module):
    """Gumbel quantizer: replaces a vector by the entry with the largest of K logits.

    The original adds Gumbel noise outside training too, so that its codes vary; here codes are deterministic.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.code_channels, config.codebook_size, 1)
        self.embed = nn.Embedding(config.codebook_size, config.code_channels)

    def codes(self, vectors: Tensor) -> Tensor:
        """Most likely codes: (B, D, h, w) to int64 (B, h, w)."""
        logits: Tensor = self.proj(vectors.to(self.proj.weight.dtype))
        return logits.argmax(1)

    def forward(self, codes: Tensor) -> Tensor:
        """Entries of codes: int64 (B, h, w) to (B, D, h, w)."""
        entries: Tensor = self.embed(codes)
        return entries.movedim(-1, 1)


QUANTIZERS: dict[str, type[NearestQuantizer | GumbelQuantizer]] = {
    "nearest": NearestQuantizer,
    "gumbel": GumbelQuantizer,
}


def merge_bands(bands: Tensor) -> Tensor:
    """Inverse Haar wavelet of one level.

    ``out[2i + a, 2j + b] = (low + (-1)^a rows + (-1)^b columns + (-1)^(a + b) diagonal) / 2``

    Args:
        bands: C channels of the low band, then three bands of every channel, (B, 4C, h, w).

    Returns:
        Pixels, (B, C, 2h, 2w).
    """
    channels = bands.shape[1] // 4
    low, high = bands[:, :channels], bands[:, channels:]
    rows, columns, diagonal = high[:, 0::3], high[:, 1::3], high[:, 2::3]
    top, bottom = low + rows, low - rows
    left, right = columns + diagonal, columns - diagonal
    corners = torch.stack([top + left, top - left, bottom + right, bottom - right], dim=2) / 2
    return F.pixel_shuffle(corners.flatten(1, 2), 2)


@IMAGE_TOKENIZERS.register("vqgan")
class VQGAN(ImageTokenizer):
    """VQGAN with a nearest-neighbor or a Gumbel quantizer.

    With the wavelet option, images have twice the resolution of the networks. Before encoding, they are averaged over
    2x2 pixels, which gives the low band of the same wavelet.

    Reference: Taming Transformers for High-Resolution Image Synthesis (Esser et al., 2021), arXiv 2012.09841.

    Args:
        config: Architecture.

    Example:
        >>> config = VQGANConfig(image_size=32, width=32, multipliers=(1, 2), attention_sizes=(), codebook_size=16)
        >>> vqgan = VQGAN(config)
        >>> codes = vqgan.encode(torch.rand(2, 3, 32, 32))
        >>> codes.shape, vqgan.decode(codes).shape
        (torch.Size([2, 16, 16]), torch.Size([2, 3, 32, 32]))
    """

    config_class = VQGANConfig
    config: VQGANConfig

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        if not config.decoder_only:
            self.encoder = Encoder(config)
            self.quant_conv = nn.Conv2d(config.latent_channels, config.code_channels, 1)
        self.quantize = QUANTIZERS[config.quantizer](config)
        self.post_quant_conv = nn.Conv2d(config.code_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def vectors(self, images: Tensor) -> Tensor:
        """Inputs of the quantizer: pixels in [0, 1], (B, C, H, W), to (B, D, h, w).

        Raises:
            ValueError: The images have the wrong shape or type, or there is no encoder.
        """
        if self.config.decoder_only:
            raise ValueError(
                "this VQGAN has only a decoder and cannot encode images: load a VQGAN that has an encoder"
            )
        self.check_images(images)
        if images.shape[1] != self.config.channels:
            raise ValueError(f"images must have {self.config.channels} channels, got shape {tuple(images.shape)}")
        if self.config.wavelet:
            images = F.avg_pool2d(images, 2)
        if self.config.signed_pixels:
            images = 2 * images - 1
        vectors: Tensor = self.quant_conv(self.encoder(images))
        return vectors

    def encode(self, images: Tensor) -> Tensor:
        """Codes of images, without noise: pixels in [0, 1], (B, C, H, W) to int64 (B, h, w)."""
        vectors = self.vectors(images)
        with torch.autocast(vectors.device.type, enabled=False):  # rounding can change the argmin
            codes: Tensor = self.quantize.codes(vectors)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes: int64 (B, h, w) to pixels in [0, 1], (B, C, H, W)."""
        self.check_codes(codes)
        pixels: Tensor = self.decoder(self.post_quant_conv(self.quantize(codes))).float()
        if self.config.wavelet:
            pixels = merge_bands(pixels)
        if self.config.signed_pixels:
            pixels = (pixels + 1) / 2
        return pixels.clamp(0, 1)
