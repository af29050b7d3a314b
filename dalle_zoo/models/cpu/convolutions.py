"""The dVAE's residual networks on a CPU without gradients, in half the time of `F.conv2d` and `F.relu`.

Most of that time is spent on memory traffic and on slow kernels rather than on arithmetic:

- On one thread ``F.conv2d`` computes 1x1 kernels as a plain matrix product, which is 2.3 times slower than oneDNN's
  kernel. Here oneDNN computes all convolutions, with weights packed once per call.
- ReLU, the gain and the sum of a residual block are fused into the convolution before or after them.
- Large tensors are reused: requesting 67 MB of new pages from the system takes 28 ms, filling them takes 3 ms.
- As in the plain modules, 1x1 operations of the decoder come before pixels are repeated.

The values equal those of the modules up to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dalle_zoo.models.cpu import onednn

# B batch, C channels, H W image or any resolution of it

Step = Callable[[Tensor], Tensor]


def usable(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether these classes can replace the plain modules: on a CPU, without gradients, with float32 weights.

    Args:
        x: Images or codes, the input of the network.
        weight: Any weight of the network.
        dtype: Computation dtype; bfloat16 needs a processor with bfloat16 instructions.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.is_grad_enabled() or not x.numel():
        return False
    return onednn.convolutions_work() and onednn.computes_in(dtype)


class Memory:
    """Pool of large tensors that are reused.

    Args:
        dtype: Dtype of the tensors.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._pieces: list[Tensor] = []

    def take(self, shape: tuple[int, ...], *busy: Tensor) -> Tensor:
        """Returns an uninitialized tensor (B, C, H, W) in channels-last order.

        Args:
            shape: Shape of the tensor.
            busy: Tensors that it must not overlap. All other tensors of the pool may be overwritten.
        """
        batch, channels, height, width = shape
        size = batch * channels * height * width
        in_use = {tensor.untyped_storage().data_ptr() for tensor in busy}
        free = [piece for piece in self._pieces if piece.untyped_storage().data_ptr() not in in_use]
        piece = next((piece for piece in free if len(piece) >= size), None)
        if piece is None:
            if free:  # too small, and not needed any more once there is a larger one
                self._pieces = [retained for retained in self._pieces if retained is not free[0]]
            piece = torch.empty(size, dtype=self.dtype)
            self._pieces.append(piece)
        return piece[:size].view(batch, height, width, channels).permute(0, 3, 1, 2)


class Convolution:
    """A same-size convolution by oneDNN; its plain twin is ``gain * conv(x)``.

    Args:
        conv: Module with the weights; its stride is 1.
        dtype: Computation dtype.
        gain: Factor of the result, folded into the weights. Defaults to 1.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, gain: float = 1.0) -> None:
        assert conv.bias is not None
        self.outputs = conv.out_channels
        weight, bias = conv.weight, conv.bias
        if gain != 1.0:  # a product would allocate another copy of all weights
            weight, bias = gain * weight, gain * bias
        self._weight, self._bias = weight.to(dtype), bias.to(dtype)
        self._packed = False

    def _weight_for(self, x: Tensor) -> Tensor:
        if not self._packed:  # the best layout depends on the resolution, which is known from the first input
            self._weight, self._packed = onednn.reorder_convolution(self._weight, x.shape), True
        return self._weight

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """Convolves, then applies "relu" or "none": (B, inputs, H, W) to (B, outputs, H, W)."""
        return onednn.convolve(x, self._weight_for(x), self._bias, activation)

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """Adds the convolution of ``x`` to ``out`` in place."""
        return onednn.convolve_add(out, x, self._weight_for(x), self._bias)

    def into(self, out: Tensor, x: Tensor) -> Tensor:
        """Writes the convolution of ``x`` to ``out``."""
        return self.add(out.zero_(), x)


class Cells:
    """A 1x1 convolution of single cells in float32; its plain twin is `F.linear`."""

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
    """``skip(x) + gain * branch(x)`` as in `dalle_zoo.models.dvae.Block`; without a skip it overwrites ``x``.

    Args:
        block: The plain module.
        memory: Pool for large tensors.
        doubles: Whether the block doubles the resolution, repeating each pixel four times. The skip and the first
            convolution of the decoder are 1x1, so they run before the repetition: a quarter of the work, equal values.
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
    """First convolution, groups of blocks, ReLU: the twin of `Encoder.features` and of the decoder's groups.

    Args:
        input: The first convolution; None if the input is already a tensor of vectors.
        groups: Groups of blocks, each optionally followed by a resize.
        dtype: Computation dtype.
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
        """2x2 max-pooling without the indices that `F.max_pool2d` stores for the backward pass."""
        batch, channels, height, width = x.shape
        rows = self.memory.take((batch, channels, height // 2, width), x)
        torch.maximum(x[:, :, ::2], x[:, :, 1::2], out=rows)
        out = self.memory.take((batch, channels, height // 2, width // 2), rows)
        return torch.maximum(rows[..., ::2], rows[..., 1::2], out=out)
