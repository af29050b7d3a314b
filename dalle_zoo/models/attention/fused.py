"""PyTorch's fused attention operators, called directly because they also return the sums of the softmax.

Attention over one set of keys can be split into parts. If l is the logarithm of a part's sum, the total has
``l = log(exp(l_1) + exp(l_2))`` and ``out = out_1 exp(l_1 - l) + out_2 exp(l_2 - l)``. The backward pass of a part,
called with ``out`` and ``l`` of the total, computes the part's share of the gradients, because its weights are then
``exp(score - l)``. The public `torch.nn.functional.scaled_dot_product_attention` neither returns nor accepts l.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo.models.shortcuts import switchable

aten = torch.ops.aten

# B batch, H heads, M queries, U keys, D head size

ALIGNMENT = 16
"""The memory-efficient kernel reads rows of an additive mask in steps of this many numbers."""
SUMS = 32
"""The memory-efficient kernel returns and accepts sums for a multiple of this many queries."""


class Reads(NamedTuple):
    """Keys that the queries of a fused call attend to."""

    causal: bool = False
    """Whether query i attends to keys 0 … i only."""
    bias: Tensor | None = None
    """Bias of the scores from `additive`, -inf for forbidden pairs; broadcast to (B, H, M, U)."""


class Passed(NamedTuple):
    """Inputs of the backward pass of a part."""

    gradient: Tensor
    """Gradient of the total's mixed values, (B, H, M, D)."""
    query: Tensor
    """Queries of the part, (B, H, M, D)."""
    key: Tensor
    """Keys of the part, (B, H, U, D)."""
    value: Tensor
    """Values of the part, (B, H, U, D)."""
    out: Tensor
    """Mixed values of the total, (B, H, M, D)."""
    sums: Tensor
    """Logarithms of the total's sums, (B, H, M)."""


def supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the operators, which are private and may change between versions of PyTorch, work as expected here."""
    return device.type in ("cpu", "cuda") and _works(device, dtype)


# Compiled code uses the result as a constant. torch.compiler.assume_constant_result does the same, but takes a second
# to import the compiler.
supported._dynamo_marked_constant = True  # type: ignore[attr-defined]


@switchable
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Runs both passes once without a mask, causally, and with a bias."""
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
    """Converts a bool mask (…, M, U) to a float32 bias; rows are padded beyond U to the alignment of the kernels."""
    bias = torch.zeros_like(allowed, dtype=torch.float32).masked_fill(~allowed, -math.inf)
    return F.pad(bias, (0, -allowed.shape[-1] % ALIGNMENT)).to(device)


def forward(query: Tensor, key: Tensor, value: Tensor, reads: Reads) -> tuple[Tensor, Tensor]:
    """Returns mixed values (B, H, M, D) and the logarithm of each query's softmax sum, float32 (B, H, M)."""
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
    """Returns gradients of queries (B, H, M, D), keys and values (B, H, U, D)."""
    gradient, query, key, value, out, sums = passed
    bias = _expanded(reads.bias, query, key)
    if query.device.type == "cpu":
        kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = kernel(gradient, query, key, value, out, sums, 0.0, reads.causal, attn_mask=bias)
    else:
        nothing = torch.empty((), dtype=torch.int64, device=query.device)  # random state of the dropout, which is off
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
