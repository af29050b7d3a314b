"""Sampling noise as a pure function of (image seed, step, vocabulary entry).

A token is sampled as ``argmax(logits + Gumbel)``. The noise comes from a counter-based hash instead of a stateful
generator, so an image depends only on its own seed: not on the other images of the batch, the batch size, the device,
or interruptions of the run.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# B images, V vocabulary

_MASK_63 = (1 << 63) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: the increment of splitmix64


def derive_seed(*parts: int | str) -> int:
    """Derives a 63-bit seed from any description of an image, the same on every machine.

    Example:
        >>> derive_seed(0, "prompt", 3) == derive_seed(0, "prompt", 3)
        True
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") & _MASK_63


def _signed(constant: int) -> int:
    """Returns the int64 with the same low 64 bits."""
    constant %= 1 << 64
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _fold(x: Tensor, bits: int) -> None:
    """Computes ``x ^= x >> bits`` in place with a logical shift (PyTorch's is arithmetic)."""
    x ^= (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Applies the finalizer of splitmix64 in place: every input bit affects every output bit."""
    _fold(x, 30)
    x *= _signed(0xBF58476D1CE4E5B9)
    _fold(x, 27)
    x *= _signed(0x94D049BB133111EB)
    _fold(x, 31)
    return x


def gumbel(seeds: Tensor, step: int | Tensor, size: int) -> Tensor:
    """Standard Gumbel noise.

    Args:
        seeds: One seed per image, int64 (B,).
        step: Number of the token within the image: an int for all images, or int64 (1,) or (B,).
        size: Vocabulary size V.

    Returns:
        float32 (B, V).

    Example:
        >>> noise = gumbel(torch.tensor([7, 7, 8]), step=0, size=4)
        >>> noise.shape, torch.equal(noise[0], noise[1]), torch.equal(noise[0], noise[2])  # equal seeds, equal noise
        (torch.Size([3, 4]), True, False)
    """
    # In place throughout: at V = 8,192, allocating memory for every operation takes longer than the arithmetic.
    moved = (step + 1) * _signed(_GOLDEN) if isinstance(step, Tensor) else _signed((step + 1) * _GOLDEN)
    stream = _mix(seeds + moved)
    index = torch.arange(1, size + 1, device=seeds.device) * _signed(_GOLDEN)
    # 23 bits plus a half are exact in float32, so no value rounds to 1, where the noise would be infinite.
    bits = (_mix(_mix(stream[:, None] + index)) >> 41).bitwise_and_((1 << 23) - 1)
    return bits.float().add_(0.5).div_(1 << 23).log_().neg_().log_().neg_()
