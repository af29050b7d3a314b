"""PyTorch's fused attention by its own operators, which also give the sums of the softmax.

Attention over one set of keys can be split into parts. With l the logarithm of a part's sum, the total has
``l = log(exp(l_1) + exp(l_2))`` and ``out = out_1 exp(l_1 - l) + out_2 exp(l_2 - l)``. The backward pass of a part
that is given the out and l of the total computes that part's share of the total's gradients, for its weights are
then ``exp(score - l)``. The public `torch.nn.functional.scaled_dot_product_attention` neither gives l nor takes it.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten

# B batch, H heads, M queries, U keys, D head size

ALIGNMENT = 16
"""The memory-efficient kernel reads rows of an additive mask in steps of so many numbers."""
SUMS = 32
"""It gives and takes sums for a multiple of so many queries."""


class Reads(NamedTuple):
    """Which keys the queries of a fused call read."""

    causal: bool = False
    """Query i reads keys 0 … i."""
    bias: Tensor | None = None
    """Added to the scores, -inf where a query does not read: broadcast to (B, H, M, U), made by `additive`."""


class Passed(NamedTuple):
    """What the backward pass of a part starts from."""

    gradient: Tensor
    """Of the total's mixed values, (B, H, M, D)."""
    query: Tensor
    """Of the part, (B, H, M, D)."""
    key: Tensor
    """Of the part, (B, H, U, D)."""
    value: Tensor
    """Of the part, (B, H, U, D)."""
    out: Tensor
    """Mixed values of the total, (B, H, M, D)."""
    sums: Tensor
    """Logarithms of the total's sums, (B, H, M)."""


def supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch's operators do what is asked of them here; they are not public, so another's may differ."""
    return device.type in ("cpu", "cuda") and _works(device, dtype)


# Compiled code takes the answer alone. This is what torch.compiler.assume_constant_result does, but for the second
# that it takes to import the compiler.
supported._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Runs them once, both passes, with either kind of mask and none."""
    tokens = 4
    allowed = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="cpu").tril()
    with torch.inference_mode():
        x = torch.ones(1, 1, tokens, 8, dtype=dtype, device=device)
        try:
            for reads in (Reads(), Reads(causal=True), Reads(bias=additive(allowed, device))):
                out, sums = forward(x, x, x, reads)
                found = backward(Passed(x, x, x, x, out, sums), reads)
                if sums.shape != x.shape[:3] or any(tensor.shape != x.shape for tensor in (out, *found)):
                    return False
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False
    return True


def additive(allowed: Tensor, device: torch.device) -> Tensor:
    """A bool mask (…, M, U) as an additive one, float32; rows are longer than U where a kernel needs them aligned."""
    bias = torch.zeros_like(allowed, dtype=torch.float32).masked_fill(~allowed, -math.inf)
    return F.pad(bias, (0, -allowed.shape[-1] % ALIGNMENT)).to(device)


def forward(query: Tensor, key: Tensor, value: Tensor, reads: Reads) -> tuple[Tensor, Tensor]:
    """Mixed values (B, H, M, D), and the logarithm of the sum of each query's exponentials, float32 (B, H, M)."""
    bias = _expanded(reads.bias, query, key)
    if query.device.type == "cpu":
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
        out, sums = kernel(query, key, value, 0.0, reads.causal, attn_mask=bias)
    elif _takes_flash(query, reads):
        out, sums = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, reads.causal, False)[:2]
    else:
        kernel = aten._scaled_dot_product_efficient_attention
        out, sums = kernel(query, key, value, bias, True, 0.0, reads.causal)[:2]
    return out, sums[..., : query.shape[-2]]


def backward(passed: Passed, reads: Reads) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries (B, H, M, D), keys and values (B, H, U, D)."""
    gradient, query, key, value, out, sums = passed
    bias = _expanded(reads.bias, query, key)
    if query.device.type == "cpu":
        kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = kernel(gradient, query, key, value, out, sums, 0.0, reads.causal, attn_mask=bias)
    else:
        nothing = torch.empty((), dtype=torch.int64, device=query.device)  # the state of a dropout that is not there
        if _takes_flash(query, reads):
            kernel = aten._scaled_dot_product_flash_attention_backward
            lengths = (None, None, query.shape[-2], key.shape[-2])
            found = kernel(
                gradient, query, key, value, out, sums.contiguous(), *lengths, 0.0, reads.causal, nothing, nothing
            )
        else:
            kernel = aten._scaled_dot_product_efficient_attention_backward
            padded = F.pad(sums, (0, -sums.shape[-1] % SUMS), value=math.inf)  # a weight of exp(score - inf) = 0
            wanted = [True, True, True, False]
            found = kernel(gradient, query, key, value, bias, out, padded, nothing, nothing, 0.0, wanted, reads.causal)
    return found[0], found[1], found[2]


def _expanded(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if bias is None:
        return None
    keys = key.shape[-2]
    return bias.to(query.dtype)[..., :keys].expand(*query.shape[:-1], keys)


def _takes_flash(query: Tensor, reads: Reads) -> bool:
    return reads.bias is None and query.dtype != torch.float32 and query.shape[-1] % 8 == 0
