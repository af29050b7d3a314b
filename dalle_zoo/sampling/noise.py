"""Sampling noise as a pure function of (picture seed, step, vocabulary entry).

A picture is drawn by ``argmax(logits + Gumbel)``. The noise comes from a counter-based hash instead of a stateful
generator, so a picture depends on its own seed alone: not on its neighbours in the batch, the batch size, the
device, or how often the run was interrupted.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# B pictures, V vocabulary

_MASK_63 = (1 << 63) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: the increment of splitmix64


def picture_seed(*parts: int | str) -> int:
    """63-bit seed from any description of a picture, the same on every machine.

    Example:
        >>> picture_seed(0, "prompt", 3) == picture_seed(0, "prompt", 3)
        True
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") & _MASK_63


def _signed(constant: int) -> int:
    """The int64 with the same low 64 bits."""
    constant %= 1 << 64
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (PyTorch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of the splitmix64 generator: every input bit reaches every output bit."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def gumbel(seeds: Tensor, step: int, size: int) -> Tensor:
    """Standard Gumbel noise.

    Args:
        seeds: One seed a picture, int64 (B,).
        step: Number of the token within the picture.
        size: Vocabulary size V.

    Returns:
        float32 (B, V).
    """
    stream = _mix(seeds + _signed((step + 1) * _GOLDEN))
    index = torch.arange(1, size + 1, device=seeds.device) * _signed(_GOLDEN)
    # 23 bits and a half are exact in float32, so that no value rounds to 1, where the noise would be infinite.
    bits = _shift_right(_mix(_mix(stream[:, None] + index)), 41)
    uniform = (bits.float() + 0.5) / (1 << 23)
    return -torch.log(-torch.log(uniform))
