"""The back-end `auto`: it chooses by the cost of a mask's lines, and by whether the device computes them correctly.

On a CPU, `benchmarks/training.py` measures it against the other back-ends by length and dtype.

It measures nothing, so that a resumed run has the back-ends, and with them the rounding, of its first part.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from dalle_zoo.masks import Mask
from dalle_zoo.models.attention import fused
from dalle_zoo.models.attention.agreement import disagreement
from dalle_zoo.models.attention.backends import BACKENDS, Backend, cached, dense, sdpa
from dalle_zoo.models.attention.lines import lines

log = logging.getLogger(__name__)

LARGEST_SHARE = 0.7
"""Attention in lines is faster if it costs at most this share of all L * L scores."""


SHORTEST_ON_CPU = 400
"""On a CPU, attention in lines pays for its many small calls from this number of positions on."""

LONGEST_DENSE = 200
"""On a CPU in bfloat16, matrix products are faster than the fused kernel up to this number of positions."""


@BACKENDS.register("auto")
def auto(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """`lines` if it is cheaper and correct, otherwise `sdpa`, or `dense` for short streams in bfloat16 on a CPU.

    A prefix of the stream, such as the caption, is always left to `sdpa`.

    Example:
        >>> from dalle_zoo.masks import TextImageLayout
        >>> layout = TextImageLayout(text=16, height=20, width=20)
        >>> query = torch.zeros(1, 1, layout.length, 8)
        >>> [choose(Mask.from_spec(spec, layout), query).__name__ for spec in ("full", "column")]  # on a CPU
        ['sdpa', 'lines']
    """
    complete = query.shape[-2] == mask.layout.length
    return (choose(mask, query) if complete else sdpa)(query, key, value, mask)


def in_lines(mask: Mask) -> bool:
    """Whether a mask's lines have so few keys that attention in lines is faster."""
    layout = mask.layout
    cost = layout.text**2 + layout.image * layout.text + mask.line_sizes.cost
    return cost <= LARGEST_SHARE * layout.length**2


def choose(mask: Mask, query: Tensor) -> Backend:
    """Chooses the back-end for a mask and queries of this dtype and size, once per device."""
    dtype, size = query.dtype, query.shape[-1]

    def find(mask: Mask, device: torch.device) -> Backend:
        if device.type == "cpu" and dtype == torch.bfloat16 and mask.layout.length <= LONGEST_DENSE:
            return dense
        if not in_lines(mask) or not fused.supported(device, dtype):
            return sdpa
        if device.type == "cpu":  # its only kernel is covered by the tests
            return lines if mask.layout.length >= SHORTEST_ON_CPU else sdpa
        problem = disagreement(lines, mask, device, dtype, size)
        if problem is not None:
            log.warning("attention in lines is not used for mask %s on %s: %s", mask.spec, device, problem)
            return sdpa
        return lines

    return cached(mask, f"choice for {dtype} heads of {size}", query.device, find)
