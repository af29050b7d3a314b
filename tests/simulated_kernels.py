"""CUDA's attention kernels in plain operations, with their shapes and limits, for `tests.simulated_gpu`.

The shapes of the results are those of PyTorch's own descriptions of the kernels, which each call compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# B batch, H heads, M queries, U keys, D head size


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """float32 (B, H, M, U)."""
    scores = query.float() @ key.float().mT / math.sqrt(query.shape[-1])
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    return scores


def _check_bias(bias: Tensor | None) -> None:
    if bias is not None and any(stride % 16 for stride in bias.stride()[:3]):
        raise RuntimeError(f"attn_bias is not correctly aligned: strides {bias.stride()}")


def _as_described(kernel: Any, arguments: tuple[Any, ...], *results: Tensor) -> None:
    """Raises an error unless PyTorch's description of a kernel has the same shapes and dtypes."""
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
    for described, result in zip(kernel(*meta), results, strict=False):
        assert (described.shape, described.dtype) == (result.shape, result.dtype), (kernel, described, result)


def _gradients(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, scores: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, given scores and the logarithms of the softmax's sums."""
    weights = (scores - sums[..., None]).exp()
    wide = gradient.float()
    errors = (
        weights * (wide @ value.float().mT - (wide * out.float()).sum(-1, keepdim=True)) / math.sqrt(query.shape[-1])
    )
    found = errors @ key.float(), errors.mT @ query.float(), weights.mT @ wide
    return tuple(x.to(query.dtype) for x in found)  # type: ignore[return-value]


def efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, with_sums: bool, dropout: float = 0.0,
    causal: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``aten._scaled_dot_product_efficient_attention``."""
    _check_bias(bias)
    assert with_sums
    assert not dropout
    scores = _scores(query, key, bias, causal)
    sums = torch.nn.functional.pad(scores.logsumexp(-1), (0, -query.shape[2] % 32), value=math.inf)
    out = (scores.softmax(-1) @ value.float()).to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    kernel = aten._scaled_dot_product_efficient_attention
    _as_described(kernel, (query, key, value, bias, True, 0.0, causal), out, sums)
    return out, sums, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def efficient_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor, sums: Tensor,
    seed: Tensor, offset: Tensor, dropout: float, wanted: list[bool], causal: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """``aten._scaled_dot_product_efficient_attention_backward``."""
    _check_bias(bias)
    if sums.shape[-1] % 32:
        raise RuntimeError(f"logsumexp has {sums.shape[-1]} queries, expected a multiple of 32")
    scores, rows = _scores(query, key, bias, causal), query.shape[2]
    return (*_gradients(gradient, query, key, value, out, scores, sums[..., :rows]), None)


def flash(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, with_mask: bool = False
) -> tuple[Any, ...]:
    """``aten._scaled_dot_product_flash_attention``."""
    if query.dtype == torch.float32 or query.shape[-1] % 8:
        raise RuntimeError(f"FlashAttention takes half precision and heads of a multiple of 8, got {query.dtype}")
    scores = _scores(query, key, None, causal)
    out, sums = (scores.softmax(-1) @ value.float()).to(query.dtype), scores.logsumexp(-1)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    kernel = aten._scaled_dot_product_flash_attention
    _as_described(kernel, (query, key, value, 0.0, causal, False), out, sums)
    nothing = torch.zeros((), dtype=torch.int64)
    return out, sums, None, None, query.shape[2], key.shape[2], nothing, nothing, None


def flash_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, first: None, last: None,
    queries: int, keys: int, dropout: float, causal: bool, seed: Tensor, offset: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``aten._scaled_dot_product_flash_attention_backward``."""
    assert sums.is_contiguous()
    assert (queries, keys) == (query.shape[2], key.shape[2])
    return _gradients(gradient, query, key, value, out, _scores(query, key, None, causal), sums)


KERNELS: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_efficient_attention.default: efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
    aten._scaled_dot_product_flash_attention.default: flash,
    aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
}
"""Kernels by operation."""
