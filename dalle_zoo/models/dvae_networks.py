"""Networks of the discrete VAE: a convolutional encoder and decoder without normalization layers (appendix A).

The encoder computes K logits for every cell of a coarse grid. The decoder mirrors it and computes the location and
log-scale of the logit-Laplace distribution of every pixel. `dalle_zoo.models.dvae` combines both.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.models.cpu import convolutions
from dalle_zoo.values import check_integers

# B batch, C channels, H W image, h w code grid (H / factor, W / factor), K codebook size

_PASS_BYTES = {"cpu": 16 << 20, "cuda": 2 << 30}
"""Largest tensor of one pass without gradients, bytes: about the cache of a CPU, and enough to occupy a GPU."""
_LOGITS_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Size of the code logits in memory at once when only the largest is needed, bytes."""


@dataclass(frozen=True, kw_only=True)
class DVAEEncoderConfig:
    """Architecture of the encoder; defaults are the paper's (appendix A.1).

    Example:
        >>> config = DVAEEncoderConfig(image_size=64, width=32, num_groups=3)
        >>> config.factor, config.grid_size, config.widths
        (4, 16, [32, 64, 128])
    """

    image_size: int = 256
    """Side of the square training images, pixels. The network itself takes any multiple of the factor."""
    channels: int = 3
    """Image channels."""
    width: int = 256
    """Channels of the first group; every further group doubles them."""
    num_groups: int = 4
    """Groups of residual blocks; resolution halves between groups, so the factor is 2 ** (num_groups - 1)."""
    blocks_per_group: int = 2
    """Residual blocks in a group."""
    codebook_size: int = 8192
    """Number of codes K."""
    residual_gain: float | None = None
    """Gain of every residual branch. Defaults to the paper's 1 / (number of blocks)^2, which keeps a deep network
    stable at the start (appendix A.1); a small network that sees few images learns faster with 1."""
    pixel_eps: float = 0.1
    """Pixels are mapped from [0, 1] to [eps, 1 - eps] before the likelihood (appendix A.3)."""

    def __post_init__(self) -> None:
        check_integers(self, "image_size", "channels", "num_groups", "blocks_per_group", "width")
        check_integers(self, "codebook_size", least=2)
        if self.width < 4 or self.width % 4:
            raise ValueError(f"width must be a multiple of 4 (the bottleneck is a quarter), got {self.width}")
        if self.residual_gain is not None and not self.residual_gain > 0:
            raise ValueError(f"residual_gain must be above 0, got {self.residual_gain}")
        if not 0 < self.pixel_eps < 0.5:
            raise ValueError(f"pixel_eps must be between 0 and 0.5, got {self.pixel_eps}")
        if self.image_size % self.factor:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of the downsampling factor {self.factor} "
                f"(2 ** (num_groups - 1)): choose another image_size or num_groups"
            )

    @property
    def factor(self) -> int:
        """Pixels per code along one side."""
        return 1 << (self.num_groups - 1)

    @property
    def grid_size(self) -> int:
        """Codes along one side of an image of ``image_size``."""
        return self.image_size // self.factor

    @property
    def widths(self) -> list[int]:
        """Channels of the groups, finest resolution first."""
        return [self.width * 2**group for group in range(self.num_groups)]

    @property
    def gain(self) -> float:
        """Gain of every residual branch."""
        if self.residual_gain is not None:
            return self.residual_gain
        return 1 / (self.num_groups * self.blocks_per_group) ** 2


@dataclass(frozen=True, kw_only=True)
class DVAEConfig(DVAEEncoderConfig):
    """Architecture of the discrete VAE; defaults are the paper's (appendix A.1).

    Example:
        >>> DVAEConfig().image_size, DVAEConfig().grid_size  # the paper's
        (256, 32)
    """

    decoder_stem: int = 128
    """Dimension of a code's embedding, the input of the decoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, "decoder_stem")


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of the convolutions in the current context: that of autocast, otherwise that of the weight."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def num_per_pass(device: torch.device, channels: int, height: int, width: int) -> int:
    """Number of images per pass without gradients, from the size of their largest tensor."""
    return max(1, _PASS_BYTES.get(device.type, _PASS_BYTES["cuda"]) // (4 * channels * height * width))


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    """Same-size convolution, weights N(0, 1 / fan-in), bias 0: the initialization of the released code."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    if not conv.weight.is_meta:
        nn.init.normal_(conv.weight, std=1 / math.sqrt(inputs * kernel**2))
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class Block(nn.Module):
    """Bottleneck residual block, ``x + gain * branch(x)`` with a ReLU before each of four convolutions.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels; the bottleneck is a quarter of them.
        kernels: Sizes of the four kernels. The 1x1 kernel is next to the relaxation: last in the encoder, first in
            the decoder (appendix A.1).
        gain: Factor of the residual branch.
    """

    def __init__(self, inputs: int, outputs: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        self.gain = gain
        hidden = outputs // 4
        self.skip: nn.Module = _conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.conv_1 = _conv(inputs, hidden, kernels[0])
        self.conv_2 = _conv(hidden, hidden, kernels[1])
        self.conv_3 = _conv(hidden, hidden, kernels[2])
        self.conv_4 = _conv(hidden, outputs, kernels[3])

    def forward(self, x: Tensor, upsample: nn.Module | None = None) -> Tensor:
        """Adds the branch: (B, inputs, h, w) to (B, outputs, h, w).

        Args:
            x: Input.
            upsample: Nearest-neighbor upsampling of the input. It commutes with operations on single cells, so
                it follows the ReLU and the 1x1 convolutions here, which saves most of their time and memory.
        """
        y, skip = self.conv_1(F.relu(x)), self.skip(x)
        if upsample is not None:
            assert self.conv_1.kernel_size == (1, 1)
            y, skip = upsample(y), upsample(skip)
        y = self.conv_2(F.relu(y))
        y = self.conv_3(F.relu(y))
        y = self.conv_4(F.relu(y))
        out: Tensor = skip + self.gain * y
        return out


def _group(
    inputs: int, outputs: int, blocks: int, kernels: tuple[int, int, int, int], gain: float, resize: nn.Module | None
) -> nn.Sequential:
    layers: list[tuple[str, nn.Module]] = [
        (f"block_{i + 1}", Block(inputs if i == 0 else outputs, outputs, kernels, gain)) for i in range(blocks)
    ]
    if resize is not None:
        layers.append(("resize", resize))
    return nn.Sequential(OrderedDict(layers))


class Encoder(nn.Module):
    """Maps images to unnormalized log-probabilities over codes.

    Reference: Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), appendix A.1.
    """

    def __init__(self, config: DVAEEncoderConfig) -> None:
        super().__init__()
        widths = config.widths
        self.input = _conv(config.channels, widths[0], 7)
        groups = []
        for g, width in enumerate(widths):
            # Max-pooling reached a better evidence bound than average-pooling (appendix A.1).
            pool = nn.MaxPool2d(2) if g + 1 < len(widths) else None
            inputs = widths[max(g - 1, 0)]
            group = _group(inputs, width, config.blocks_per_group, (3, 3, 3, 1), config.gain, pool)
            groups.append((f"group_{g + 1}", group))
        self.groups = nn.Sequential(OrderedDict(groups))
        self.output = _conv(widths[-1], config.codebook_size, 1)

    def features(self, images: Tensor) -> Tensor:
        """Features before the linear map to logits: mapped pixels (B, C, H, W) to (B, widest group, h, w)."""
        return F.relu(self.groups(self.input(images)))

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """Codes of the largest logits, without all logits in memory at once.

        Args:
            images: Pixels in [eps, 1 - eps], (B, C, H, W).

        Returns:
            int64 (B, h, w).
        """
        dtype = _compute_dtype(self.input.weight)
        fused = convolutions.usable(images, self.input.weight, dtype)
        features = convolutions.Network(self.input, self.groups, dtype) if fused else self.features
        logits = convolutions.Cells(self.output) if fused else self._logits_of_rows
        cells = max(1, _LOGITS_BYTES.get(images.device.type, _LOGITS_BYTES["cuda"]) // (4 * self.output.out_channels))
        codes = []
        for part in torch.split(images, num_per_pass(images.device, self.input.out_channels, *images.shape[2:])):
            found = features(part.contiguous(memory_format=torch.channels_last))
            rows = found.to(self.output.weight.dtype).permute(0, 2, 3, 1).flatten(0, 2)
            largest = torch.cat([logits(few).argmax(1) for few in torch.split(rows, cells)])
            codes.append(largest.view(len(part), *found.shape[2:]))
        return torch.cat(codes)

    def _logits_of_rows(self, rows: Tensor) -> Tensor:
        """Logits of single cells: features (n, C) to (n, K)."""
        with torch.autocast(rows.device.type, enabled=False):  # as in `forward`
            return F.linear(rows, self.output.weight[:, :, 0, 0], self.output.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Encodes.

        Args:
            images: Pixels in [eps, 1 - eps], (B, C, H, W).

        Returns:
            Logits in float32, (B, K, h, w).
        """
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):  # float32, as in the paper
            logits: Tensor = self.output(features.to(self.output.weight.dtype))
        return logits.float()


class Decoder(nn.Module):
    """Maps cells of (soft) one-hot codes to the parameters of the pixel distribution.

    Reference: Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), appendix A.1.
    """

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.channels = config.channels
        self.input = _conv(config.codebook_size, config.decoder_stem, 1)
        groups = []
        for g, width in enumerate(widths):
            up = nn.Upsample(scale_factor=2, mode="nearest") if g + 1 < len(widths) else None
            inputs = widths[g - 1] if g else config.decoder_stem
            group = _group(inputs, width, config.blocks_per_group, (1, 3, 3, 3), config.gain, up)
            groups.append((f"group_{g + 1}", group))
        self.groups = nn.Sequential(OrderedDict(groups))
        self.output = _conv(widths[-1], 2 * config.channels, 1)

    def forward(self, cells: Tensor) -> Tensor:
        """Decodes soft cells.

        Args:
            cells: Weights over the codes, (B, K, h, w), each cell summing to one.

        Returns:
            Location (first C channels) and log-scale (last C) of the logit-Laplace, float32, (B, 2C, H, W).
        """
        with torch.autocast(cells.device.type, enabled=False):  # float32, as in the paper
            stem = self.input(cells.to(self.input.weight.dtype))
        return self.from_stem(stem)

    def from_codes(self, codes: Tensor) -> Tensor:
        """Decodes hard codes (B, h, w) by an embedding lookup instead of a product with one-hot cells."""
        return self.code_decoder(codes)(codes)

    def code_decoder(self, codes: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns a function that decodes parts of the codes like `from_codes`; a CPU packs weights only once."""
        dtype = _compute_dtype(self.output.weight)
        if not convolutions.usable(codes, self.output.weight, dtype):
            return lambda part: self.from_stem(self._embed(part))
        network, output = convolutions.Network(None, self.groups, dtype), convolutions.Convolution(self.output, dtype)
        return lambda part: output(network(self._embed(part))).float()

    def _embed(self, codes: Tensor) -> Tensor:
        """Embeddings of hard codes: (B, h, w) to (B, stem, h, w)."""
        table = self.input.weight[:, :, 0, 0].t()
        return (F.embedding(codes, table) + self.input.bias).permute(0, 3, 1, 2)  # type: ignore[operator]

    def from_stem(self, stem: Tensor) -> Tensor:
        """Decodes embeddings of the cells, (B, stem, h, w), to distribution parameters (B, 2C, H, W)."""
        x, upsample = stem, None
        for group in self.groups:
            assert isinstance(group, nn.Sequential)
            for layer in group:
                if isinstance(layer, Block):
                    x, upsample = layer(x, upsample), None
                else:
                    upsample = layer
        pixels: Tensor = self.output(F.relu(x))
        return pixels.float()
