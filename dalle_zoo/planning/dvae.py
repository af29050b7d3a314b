"""Parameters, activations and operations of the dVAE, read from the network itself."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.initial import shapes_only
from dalle_zoo.planning.formats import FLOAT32, Formats
from dalle_zoo.planning.parameters import Parameter
from dalle_zoo.planning.workload import Bytes, Flops, Layer, Workload

IN_FLOAT32 = ("encoder.output", "decoder.input")
"""Convolutions that are computed in float32 under every precision."""
INDEX = 8
"""Bytes of the position of a maximum, which pooling retains."""


class DVAEWorkload(Workload):
    """Training step of the dVAE through the Gumbel-softmax; it has no recomputation."""

    stage = "dvae"
    module = "DVAEModule"
    config_class = DVAEConfig

    def __init__(self, config: DVAEConfig) -> None:
        self.config = config
        with shapes_only():
            net = DVAE(config)
        layers = dict(_layers("encoder", net.encoder, config.image_size))
        layers |= _layers("decoder", net.decoder, config.grid_size)
        self.convs = {name: layer for name, layer in layers.items() if layer.flops}
        self.pools = [layer for layer in layers.values() if not layer.flops]
        self.values, self.codes = config.channels * config.image_size**2, self.convs["encoder.output"].outputs
        self.tokens = config.grid_size**2
        self.parameters = tuple(
            Parameter(name=name, shape=tuple(p.shape), autocast=not name.startswith(IN_FLOAT32))
            for name, p in net.named_parameters()
        )
        self.counts = {part: sum(p.numel() for p in child.parameters()) for part, child in net.named_children()}
        self.flops = Flops({part: self._flops(part) for part in self.counts}, 0.0)

    def _flops(self, part: str) -> float:
        """Operations of convolutions; all others are not counted."""
        return float(sum(conv.flops for name, conv in self.convs.items() if name.startswith(part)))

    def retained(self, batch: int, formats: Formats, recompute: bool) -> Bytes:
        """Inputs of convolutions and of pooling, softmaxes of the codes, terms of the likelihood."""
        c = formats.compute
        # The decoder reads relaxed codes, which are counted with the softmaxes.
        inputs = sum(
            conv.inputs * (FLOAT32 if name in IN_FLOAT32 else c)
            for name, conv in self.convs.items()
            if name != "decoder.input"
        )
        # The ReLU before the encoder's float32 convolution retains a copy in the precision of the groups.
        copy = self.convs["encoder.output"].inputs * c if c < FLOAT32 else 0
        return {
            "activations: convolutions": batch * (inputs + copy),
            "activations: pooling": batch * sum(pool.inputs * c + pool.outputs * INDEX for pool in self.pools),
            # Relaxed codes, logarithms and probabilities of the KL divergence.
            "activations: codes, float32": batch * 3 * self.codes * FLOAT32,
            # Of each value: sign and size of the deviation, exponential of the scale.
            "activations: likelihood, float32": batch * 3 * self.values * FLOAT32,
        }

    def at_loss(self, batch: int, formats: Formats) -> Bytes:
        """Terms of the likelihood and of the KL divergence that are freed once they are summed."""
        return {"terms of the loss": batch * (self.codes + 3 * self.values) * FLOAT32}

    def in_backward(self, batch: int, formats: Formats, recompute: bool) -> Bytes:
        """Gradients at the widest part of the network, and those of the codes."""
        widest = max(conv.outputs for name, conv in self.convs.items() if name.startswith("encoder.groups"))
        return {
            "gradients of activations": batch * 3 * widest * formats.compute,
            "gradients of logits": batch * 3 * self.codes * FLOAT32,
        }


def _layers(part: str, module: nn.Module, side: int) -> Iterator[tuple[str, Layer]]:
    """Convolutions and poolings of the encoder or the decoder, which registers modules in the order in which they run.

    Args:
        part: Name of the part.
        module: The part.
        side: Positions along one side of its input.
    """
    outputs, upsampling = 0, 1
    for name, layer in module.named_modules(prefix=part):
        if isinstance(layer, nn.Conv2d):
            if layer.kernel_size != (1, 1):  # the 1x1 convolutions of a block precede its upsampling, see `Block`
                side, upsampling = side * upsampling, 1
            sizes = Layer.of(layer, side**2)
            outputs = sizes.outputs
            yield name, sizes
        elif isinstance(layer, nn.MaxPool2d):
            assert isinstance(layer.kernel_size, int)
            side //= layer.kernel_size
            yield name, Layer(outputs, outputs // layer.kernel_size**2, 0)
        elif isinstance(layer, nn.Upsample):
            assert isinstance(layer.scale_factor, float)
            upsampling *= int(layer.scale_factor)
