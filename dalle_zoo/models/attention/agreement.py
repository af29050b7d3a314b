"""Compares a back-end with the dense reference on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_zoo.masks import Mask
from dalle_zoo.models.attention.backends import Backend, dense

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest allowed difference, relative to the largest value: several roundings of the dtype (TF32 on GPUs), and far
below the effect of a wrong mask or gradient."""
HEADS = 2


def disagreement(
    backend: Backend, mask: Mask, device: torch.device, dtype: torch.dtype, head_size: int, gradients: bool = True
) -> str | None:
    """Describes how a back-end differs from `dense` on random inputs; None if they agree.

    It runs outside autocast and does not change the state of random generators.

    Args:
        backend: Back-end to check.
        mask: Mask to check it with.
        device: Device to check it on.
        dtype: Dtype of queries, keys and values.
        head_size: Head size D.
        gradients: Whether to compare gradients too. Defaults to True.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (4, 1, HEADS, mask.layout.length, head_size)
    *inputs, weights = torch.randn(shape, generator=generator).to(device, dtype)

    def results(backend: Backend, dtype: torch.dtype) -> dict[str, Tensor]:
        query, key, value = (x.to(dtype).requires_grad_(gradients) for x in inputs)
        out = backend(query, key, value, mask)
        found = torch.autograd.grad((out * weights.to(dtype)).sum(), (query, key, value)) if gradients else ()
        names = ("gradients of queries", "gradients of keys", "gradients of values")
        return {"values": out.detach(), **dict(zip(names, found, strict=False))}

    with torch.set_grad_enabled(gradients), torch.autocast(device.type, enabled=False):
        expected = results(dense, torch.float32)
        try:
            came = results(backend, dtype)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    limit = TOLERANCE[dtype]
    for name, oracle in expected.items():
        off = float((came[name].float() - oracle).abs().max() / oracle.abs().max())
        if not off <= limit:  # NaN must fail too
            return (
                f"{name} differ from the dense ones by {off:.2g} of the largest value, but rounding is below {limit}"
            )
    return None
