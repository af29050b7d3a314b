"""The dVAE's residual networks on a CPU without gradients, in half the time of `F.conv2d` and `F.relu`.

What costs there is less the arithmetic than the memory around it, and a slower library for some kernels:

- ``F.conv2d`` on one thread leaves 1x1 kernels to a plain matrix product, 2.3 times slower than oneDNN's kernel. Here
  all convolutions are oneDNN's, with weights laid out once per call.
- ReLU, the gain and the sum of a residual block happen inside the convolution before or after them.
- Large tensors are kept and written again: asking the system for 67 MB of new pages takes 28 ms, filling them 3.
- What the decoder does to single pixels it does before they are repeated: a sixth of its arithmetic less.

The values are those of the modules to float32 rounding. The operators are the ones that `torch.compile` emits on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

# B batch, C channels, H W image or any resolution of it

Step = Callable[[Tensor], Tensor]


def usable(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether this way is open to images or codes: on a CPU with oneDNN, without gradients, with float32 weights.

    Args:
        x: What comes in.
        weight: Of the network.
        dtype: To compute in; bfloat16 needs a processor that has it.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.is_grad_enabled() or not x.numel():
        return False
    if not torch.backends.mkldnn.is_available() or not _works():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
@torch.inference_mode()
def _works() -> bool:
    """Whether the operators, which are private, are there and compute convolutions."""
    conv = nn.Conv2d(4, 4, 3, padding=1, device="meta").to_empty(device="cpu")  # samples no random weights
    for parameter in conv.parameters():
        parameter.copy_(torch.arange(parameter.numel(), device="cpu").sin().view_as(parameter))
    x = torch.arange(144, device="cpu").cos().view(1, 6, 6, 4).permute(0, 3, 1, 2)
    with torch.autocast("cpu", enabled=False):
        expected = conv(x).relu() + conv(x)
        try:
            torch.ops.mkldnn._is_mkldnn_bf16_supported()
            convolution = Convolution(conv, torch.float32)
            return torch.allclose(convolution.add(convolution(x, "relu"), x), expected, atol=1e-5)
        except (AttributeError, RuntimeError, TypeError):
            return False


class Memory:
    """Tensors that are written again and again.

    Args:
        dtype: Of the tensors.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._pieces: list[Tensor] = []

    def take(self, shape: tuple[int, ...], *busy: Tensor) -> Tensor:
        """A tensor (B, C, H, W) in channels-last order, with whatever was last written to it.

        Args:
            shape: Its shape.
            busy: Tensors that it must not overlap; all others that were taken before may change.
        """
        batch, channels, height, width = shape
        size = batch * channels * height * width
        in_use = {tensor.untyped_storage().data_ptr() for tensor in busy}
        free = [piece for piece in self._pieces if piece.untyped_storage().data_ptr() not in in_use]
        piece = next((piece for piece in free if len(piece) >= size), None)
        if piece is None:
            if free:  # too small, and nothing but dead weight once there is a larger one
                self._pieces = [retained for retained in self._pieces if retained is not free[0]]
            piece = torch.empty(size, dtype=self.dtype)
            self._pieces.append(piece)
        return piece[:size].view(batch, height, width, channels).permute(0, 3, 1, 2)


class Convolution:
    """A same-size convolution of oneDNN.

    Args:
        conv: Module with the weights; stride 1.
        dtype: To compute in.
        gain: Factor of the result, multiplied into the weights.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, gain: float = 1.0) -> None:
        assert conv.bias is not None
        self.outputs = conv.out_channels
        weight, bias = conv.weight, conv.bias
        if gain != 1.0:  # a product would be one more copy of all weights
            weight, bias = gain * weight, gain * bias
        self._weight, self._bias = weight.to(dtype), bias.to(dtype)
        self._geometry = ([conv.kernel_size[0] // 2] * 2, [1, 1], [1, 1], 1)  # padding, stride, dilation, groups
        self._laid_out = False

    def _weight_for(self, x: Tensor) -> Tensor:
        if not self._laid_out:  # the best layout depends on the resolution, so it is made when that is known
            self._weight = torch.ops.mkldnn._reorder_convolution_weight(
                self._weight, *self._geometry, [1, *x.shape[1:]]
            )
            self._laid_out = True
        return self._weight

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """Convolves, then applies "relu" or "none": (B, inputs, H, W) to (B, outputs, H, W)."""
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._weight_for(x), self._bias, *self._geometry, activation, [], ""
        )
        return y

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """Adds the convolution of ``x`` to ``out`` in place."""
        torch.ops.mkldnn._convolution_pointwise_.binary(
            out, x, self._weight_for(x), self._bias, *self._geometry, "add", 1.0, None, [], None
        )
        return out

    def into(self, out: Tensor, x: Tensor) -> Tensor:
        """Writes the convolution of ``x`` to ``out``."""
        return self.add(out.zero_(), x)


class Cells:
    """A 1x1 convolution over single cells, in float32."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._convolution = Convolution(conv, torch.float32)

    def __call__(self, rows: Tensor) -> Tensor:
        """(n, inputs) to (n, outputs)."""
        one_line = rows.reshape(1, 1, *rows.shape).permute(0, 3, 1, 2)
        return self._convolution(one_line).permute(0, 2, 3, 1)[0, 0]


def double(x: Tensor, out: Tensor) -> Tensor:
    """Writes each pixel four times: (B, C, H, W) to ``out``, (B, C, 2H, 2W)."""
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None]
    out.permute(0, 2, 3, 1).view(batch, height, 2, width, 2, channels).copy_(pixels)
    return out


class ResidualBlock:
    """``skip(x) + gain * branch(x)`` of `dalle_zoo.models.dvae.Block`; without a skip it writes into ``x``.

    Args:
        block: The module.
        memory: For what is large.
        doubles: Whether each pixel of ``x`` stands for four. What acts on single pixels, the skip and the decoder's
            first convolution, comes before they are repeated, with equal results for a quarter of the work.
    """

    def __init__(self, block: nn.Module, memory: Memory, doubles: bool) -> None:
        dtype = memory.dtype
        self.memory, self.doubles = memory, doubles
        self.first, *self.others = (Convolution(conv, dtype) for conv in (block.conv_1, block.conv_2, block.conv_3))  # type: ignore[arg-type]
        self.last = Convolution(block.conv_4, dtype, block.gain)  # type: ignore[arg-type]
        self.skip = Convolution(block.skip, dtype) if isinstance(block.skip, nn.Conv2d) else None

    def __call__(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W), or to twice that resolution."""
        take, batch, size = self.memory.take, len(x), x.shape[2:]
        y = self.first(torch.clamp(x, min=0, out=take(tuple(x.shape), x)), "relu")
        if self.skip is not None:
            x = self.skip.into(take((batch, self.skip.outputs, *size), x), x)
        if self.doubles:
            finer = (2 * size[0], 2 * size[1])
            y = double(y, take((batch, self.first.outputs, *finer), x))
            x = double(x, take((batch, self.last.outputs, *finer), x, y))
        for convolution in self.others:
            y = convolution(y, "relu")
        return self.last.add(x, y)


class Network:
    """First convolution, groups of blocks, ReLU.

    Args:
        input: Convolution in front; None where vectors come in.
        groups: Groups of blocks, each with a resize behind it or none.
        dtype: To compute in.
    """

    def __init__(self, input: nn.Conv2d | None, groups: nn.Sequential, dtype: torch.dtype) -> None:
        self.memory = Memory(dtype)
        self.input = None if input is None else Convolution(input, dtype)
        self.steps: list[Step] = []
        doubles = False
        for module in (module for group in groups for module in group.children()):
            if isinstance(module, nn.MaxPool2d):
                self.steps.append(self._halve)
            elif isinstance(module, nn.Upsample):
                doubles = True
            else:
                self.steps.append(ResidualBlock(module, self.memory, doubles))
                doubles = False

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the channels of the last group, at its resolution; valid until the next call."""
        x = x.to(self.memory.dtype).contiguous(memory_format=torch.channels_last)
        if self.input is not None:
            x = self.input.into(self.memory.take((len(x), self.input.outputs, *x.shape[2:])), x)
        for step in self.steps:
            x = step(x)
        return x.relu_()

    def _halve(self, x: Tensor) -> Tensor:
        """Largest of 2x2, without the indices that `F.max_pool2d` stores for the backward pass."""
        batch, channels, height, width = x.shape
        rows = self.memory.take((batch, channels, height // 2, width), x)
        torch.maximum(x[:, :, ::2], x[:, :, 1::2], out=rows)
        out = self.memory.take((batch, channels, height // 2, width // 2), rows)
        return torch.maximum(rows[..., ::2], rows[..., 1::2], out=out)
