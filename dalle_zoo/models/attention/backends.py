"""The type of a back-end, and the two back-ends that use the mask as a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo.masks import Mask
from dalle_zoo.registry import Registry

# B batch, L positions, H heads, D head size

Backend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]
"""Queries, keys, values (B, H, L, D) and a mask over L positions to mixed values (B, H, L, D)."""

BACKENDS: Registry[Backend] = Registry("attention back-end", group="dalle_zoo.attention_backends")

K = TypeVar("K")


def cached(mask: Mask, name: str, device: torch.device, make: Callable[[Mask, torch.device], K]) -> K:
    """Returns what a back-end derives from a mask once per device, such as its matrix.

    The result is stored in the mask, not in a table of masks: compiled code guards the attributes of an object, but
    confuses two objects that are keys of a table.
    """
    key = f"{name} on {device}"
    if key not in mask.cached:
        with torch.inference_mode(False):  # the first call may be in inference mode, and training uses it too
            mask.cached[key] = make(mask, device)
    return cast(K, mask.cached[key])


@BACKENDS.register("dense")
def dense(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """softmax(Q K^T / sqrt(D) + M) V with all scores in memory: the reference.

    Example:
        >>> from dalle_zoo.masks import TextImageLayout
        >>> mask = Mask.from_spec("full", TextImageLayout(text=1, height=1, width=2))
        >>> query, key, value = torch.zeros(3, 1, 1, 3, 1)
        >>> value = torch.tensor([1.0, 3.0, 8.0]).view(1, 1, 3, 1)
        >>> dense(query, key, value, mask).flatten()  # equal scores: means of the positions so far
        tensor([1., 2., 4.])
    """
    length = query.shape[-2]
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    allowed = cached(mask, "matrix", query.device, Mask.dense)[:length, :length]
    weights = torch.softmax(scores.float().masked_fill(~allowed, -math.inf), dim=-1)
    return weights.to(value.dtype) @ value


@BACKENDS.register("sdpa")
def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """PyTorch's fused attention; a plain causal mask uses its causal path.

    Example:
        >>> from dalle_zoo.masks import TextImageLayout
        >>> mask = Mask.from_spec("row", TextImageLayout(text=4, height=3, width=3))
        >>> query, key, value = torch.randn(3, 1, 2, 13, 8)  # one sample, two heads, 13 positions
        >>> torch.allclose(sdpa(query, key, value, mask), dense(query, key, value, mask), atol=1e-5)
        True
    """
    arguments: dict[str, Any] = cached(mask, "arguments of sdpa", query.device, Mask.sdpa_arguments)
    length = query.shape[-2]
    if "attn_mask" in arguments:  # a prefix of the stream, such as the text, uses the corner of the matrix
        arguments = {"attn_mask": arguments["attn_mask"][:length, :length]}
    return F.scaled_dot_product_attention(query, key, value, **arguments)
