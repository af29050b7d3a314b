"""FlexAttention, PyTorch's compiler of masks, used only after a check of values and gradients on the device.

Its compiled kernels have given wrong gradients for some shapes and GPUs, for example for heads of 64 on Hopper
(PyTorch issues 158212 and 153799). So every mask is first compared with the dense reference on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dalle_zoo.masks import Mask
from dalle_zoo.models.attention.agreement import disagreement
from dalle_zoo.models.attention.backends import BACKENDS, cached, sdpa

if TYPE_CHECKING:  # PyTorch's compiler takes seconds to import
    from torch.nn.attention.flex_attention import BlockMask

GRAPHS = 256
"""Largest number of graphs of FlexAttention in a process, one for each mask, dtype and shape. PyTorch's limit is 8,
after which it runs uncompiled at a tenth of the speed."""


@BACKENDS.register("flex")
def flex(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """FlexAttention compiled for the mask; a prefix of the stream uses `sdpa`.

    Raises:
        NotImplementedError: Gradients are needed on the CPU, where PyTorch has no backward pass.
        RuntimeError: The compiled kernel does not agree with the dense reference on this device.
    """
    if query.shape[-2] != mask.layout.length:
        return sdpa(query, key, value, mask)
    if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
        raise NotImplementedError(
            f"FlexAttention of torch {torch.__version__} has no backward pass on the CPU: to train there, use the "
            "attention back-end auto, lines or sdpa"
        )
    problem = _problem(mask, query)
    if problem is not None:
        raise RuntimeError(
            f"FlexAttention of torch {torch.__version__} is wrong for mask {mask.spec!r} on {query.device}, "
            f"{problem}: use the attention back-end auto, lines or sdpa"
        )
    return _compiled(query, key, value, mask)


def _problem(mask: Mask, query: Tensor) -> str | None:
    """Describes how the compiled kernel differs from the reference for such queries, once per device; None if not."""
    dtype, size = query.dtype, query.shape[-1]

    def find(mask: Mask, device: torch.device) -> str | None:
        return disagreement(_compiled, mask, device, dtype, size, gradients=device.type != "cpu")

    return cached(mask, f"check of flex for {dtype} heads of {size}", query.device, find)


def _compiled(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    blocks = cached(mask, "blocks of flex", query.device, _blocks)
    if torch.compiler.is_compiling():  # part of a compiled block of the network
        return flex_attention(query, key, value, block_mask=blocks)
    with config.patch(recompile_limit=GRAPHS, fail_on_recompile_limit_hit=True):
        return _kernel()(query, key, value, block_mask=blocks)


@cache
def _kernel() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return cast("Callable[..., Tensor]", torch.compile(flex_attention, dynamic=False))


def _blocks(mask: Mask, device: torch.device) -> BlockMask:
    """Finds the blocks of 128 x 128 scores that are empty."""
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask.mod(query, key)

    length = mask.layout.length
    return create_block_mask(allowed, None, None, length, length, device=device)
