"""The private oneDNN operators of PyTorch that the CPU shortcuts use, and trials that compare them with public ones.

They are the operators that `torch.compile` emits for frozen networks on a CPU. PyTorch may rename or change them, so
each shortcut first asks whether its operators work: `linears_work` and `convolutions_work` compare them with
`F.linear` and `F.conv2d` once per process, on fixed inputs that use no random numbers. `dalle_zoo.models.shortcuts`
has the switch that turns them off.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo.models.shortcuts import switchable

# B batch, C channels, H W image or any resolution of it

FAILURES = (AttributeError, RuntimeError, TypeError)
"""Errors of an operator that is missing or takes other arguments than expected."""


def reorder_linear(weight: Tensor, rows: int) -> Tensor:
    """Packs a matrix (out, in) for inputs of ``rows`` rows."""
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return out


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Applies a packed linear layer: (…, in) to (…, out)."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def reorder_convolution(weight: Tensor, shape: torch.Size) -> Tensor:
    """Packs the weight of a same-size convolution for inputs of the given shape, of any batch size."""
    out: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *_geometry(weight), [1, *shape[1:]])
    return out


def convolve(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Applies a same-size convolution, then "relu" or "none": (B, inputs, H, W) to (B, outputs, H, W)."""
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *_geometry(weight), activation, [], "")
    return out


def convolve_add(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Adds the same-size convolution of ``x`` to ``out`` in place."""
    torch.ops.mkldnn._convolution_pointwise_.binary(
        out, x, weight, bias, *_geometry(weight), "add", 1.0, None, [], None
    )
    return out


def _geometry(weight: Tensor) -> tuple[list[int], list[int], list[int], int]:
    """Padding, stride, dilation and groups of a same-size convolution."""
    return [weight.shape[2] // 2] * 2, [1, 1], [1, 1], 1


@cache
def has_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions that oneDNN uses."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except FAILURES:
        return False


def computes_in(dtype: torch.dtype) -> bool:
    """Whether the operators are fast in a dtype on this machine."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16())


@switchable
@torch.inference_mode()
def linears_work() -> bool:
    """Whether `reorder_linear` and `linear` exist and agree with `F.linear`."""
    weight, bias, x = (torch.arange(n, device="cpu").float() for n in (12, 3, 8))
    weight, x = weight.view(3, 4), x.view(2, 4)
    try:
        with torch.autocast("cpu", enabled=False):
            return torch.equal(linear(x, reorder_linear(weight, 2), bias), F.linear(x, weight, bias))
    except FAILURES:
        return False


@switchable
@torch.inference_mode()
def convolutions_work() -> bool:
    """Whether the operators of convolutions exist and agree with `F.conv2d`."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    weight = torch.arange(144, device="cpu").sin().view(4, 4, 3, 3)
    bias = torch.arange(4, device="cpu").sin()
    x = torch.arange(144, device="cpu").cos().view(1, 6, 6, 4).permute(0, 3, 1, 2)
    with torch.autocast("cpu", enabled=False):
        plain = F.conv2d(x, weight, bias, padding=1)
        try:
            packed = reorder_convolution(weight, x.shape)
            came = convolve_add(convolve(x, packed, bias, "relu"), x, packed, bias)
        except FAILURES:
            return False
    return torch.allclose(came, plain.relu() + plain, atol=1e-5)
