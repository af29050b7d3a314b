"""The dVAE's parameters, activations and operations, by the arithmetic of `dalle_zoo.models.dvae`."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_zoo.models.dvae import DVAEConfig
from dalle_zoo.planning.formats import FLOAT32, Formats
from dalle_zoo.planning.parameters import Parameter
from dalle_zoo.planning.work import Bytes, Flops, Work

ENCODER, DECODER = (3, 3, 3, 1), (1, 3, 3, 3)
"""Kernels of the four convolutions of a block."""
INDEX = 8
"""Bytes of the place of a maximum, which pooling keeps."""


@dataclass(frozen=True)
class Conv:
    """A convolution over ``side`` x ``side`` positions."""

    inputs: int
    outputs: int
    kernel: int
    side: int
    keeps: bool = True
    """Whether its input is a tensor of its own that is kept for the backward pass."""
    float32: bool = False
    """Whether it is computed in float32 whatever the precision."""

    @property
    def flops(self) -> int:
        """Operations of one image."""
        return 2 * self.inputs * self.outputs * self.kernel**2 * self.side**2


class DVAEWork(Work):
    """Training step of the dVAE through the Gumbel-softmax; it has no recomputation."""

    stage = "dvae"

    def __init__(self, config: DVAEConfig) -> None:
        self.config = config
        self.tokens = config.grid_size**2
        self.encoder, self.decoder = _encoder(config), _decoder(config)
        self.parameters = tuple(
            parameter
            for part, convs in (("encoder", self.encoder), ("decoder", self.decoder))
            for conv in convs
            for parameter in (
                Parameter(
                    kind=part, shape=(conv.outputs, conv.inputs, conv.kernel, conv.kernel), autocast=not conv.float32
                ),
                Parameter(kind=part, shape=(conv.outputs,), autocast=not conv.float32),
            )
        )

    def retained(self, batch: int, formats: Formats, recompute: bool) -> Bytes:
        """Inputs of the convolutions and of the pooling, softmaxes of the codes, terms of the likelihood."""
        del recompute
        k, c = self.config, formats.compute
        convs = [conv for conv in (*self.encoder, *self.decoder) if conv.keeps]
        inputs = sum(conv.inputs * conv.side**2 * (FLOAT32 if conv.float32 else c) for conv in convs)
        pooled = sum(
            width * (k.image_size >> group) ** 2 * (c + INDEX / 4) for group, width in enumerate(k.widths[:-1])
        )
        # The ReLU before the encoder's float32 convolution has kept a copy in the precision of the groups.
        copy = self.encoder[-1].inputs * self.tokens * c if c < FLOAT32 else 0
        # Three of the codes: relaxed cells, logarithms and probabilities of the KL.
        codes = 3 * k.codebook_size * self.tokens * FLOAT32
        # Of each value: deviation's sign and size, exp of the scale.
        likelihood = 3 * k.channels * k.image_size**2 * FLOAT32
        return {
            "activations: convolutions": batch * (inputs + copy),
            "activations: pooling": batch * pooled,
            "activations: codes, float32": batch * codes,
            "activations: likelihood, float32": batch * likelihood,
        }

    def at_step(self, batch: int, formats: Formats) -> Bytes:
        """Terms of the likelihood and of the KL that are no longer needed when their sum is known."""
        k = self.config
        return {
            "terms of the loss": batch * (k.codebook_size * self.tokens + 3 * k.channels * k.image_size**2) * FLOAT32
        }

    def in_backward(self, batch: int, formats: Formats, recompute: bool) -> Bytes:
        """Gradients at the widest place of the network, and those of the codes."""
        del recompute
        k = self.config
        widest = max(width * (k.image_size >> group) ** 2 for group, width in enumerate(k.widths))
        return {
            "gradients of activations": batch * 3 * widest * formats.compute,
            "gradients of logits": batch * 3 * k.codebook_size * self.tokens * FLOAT32,
        }

    def flops(self) -> Flops:
        """Convolutions; all else is left out."""
        parts = {"encoder": self.encoder, "decoder": self.decoder}
        return Flops({part: float(sum(conv.flops for conv in convs)) for part, convs in parts.items()}, 0.0)


def _block(inputs: int, outputs: int, kernels: tuple[int, ...], side: int) -> list[Conv]:
    """Four convolutions behind a ReLU each, and one of the identity path where the width changes."""
    hidden = outputs // 4
    widths = (inputs, hidden, hidden, hidden, outputs)
    convs = [Conv(widths[n], widths[n + 1], kernel, side) for n, kernel in enumerate(kernels)]
    return [Conv(inputs, outputs, 1, side), *convs] if inputs != outputs else convs


def _encoder(k: DVAEConfig) -> list[Conv]:
    convs = [Conv(k.channels, k.width, 7, k.image_size)]
    for group, width in enumerate(k.widths):
        for block in range(k.blocks_per_group):
            inputs = k.widths[max(group - 1, 0)] if block == 0 else width
            convs += _block(inputs, width, ENCODER, k.image_size >> group)
    return [*convs, Conv(k.widths[-1], k.codebook_size, 1, k.grid_size, float32=True)]


def _decoder(k: DVAEConfig) -> list[Conv]:
    widths = k.widths[::-1]
    # What it reads are the relaxed cells, which the softmax has kept.
    convs = [Conv(k.codebook_size, k.decoder_stem, 1, k.grid_size, keeps=False, float32=True)]
    for group, width in enumerate(widths):
        for block in range(k.blocks_per_group):
            inputs = (widths[group - 1] if group else k.decoder_stem) if block == 0 else width
            convs += _block(inputs, width, DECODER, k.grid_size << group)
    return [*convs, Conv(widths[-1], 2 * k.channels, 1, k.image_size)]
