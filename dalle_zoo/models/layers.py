"""Small pieces that several networks share."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise in float32 of the shape and on the device of ``like``.

    ``-ln(E)`` with E exponential, which is finite: the exponential sampler never returns 0 after the clamp.
    """
    noise = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    return -noise.exponential_(generator=generator).clamp_min_(torch.finfo(torch.float32).tiny).log()
