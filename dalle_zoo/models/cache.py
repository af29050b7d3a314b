"""Key-value cache of one layer during generation: static buffers, sized by the keys that the mask still needs.

```
            text keys, once per prompt      image keys, once per candidate: the slots of the mask's cache plan
scores  =  [ q · k_0 … q · k_T-1     |    q · k of the slots that this step reads ]  ─► one softmax ─► mixed values
```
The slots that a step writes and reads are the same for all layers with one mask (`StepSlots`). If the step is an int,
contiguous slots are slices. If it is a tensor on the device, the slots are rows of tables, and nothing in the step
depends on the host, so a CUDA graph can replay it.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dalle_zoo.masks import Mask

# P prompts, n candidates of each, W positions of a window, H heads, D head size, T text positions, N image positions,
# S slots of the cache plan, R slots that are read

IN_PLACE = 3
"""A contiguous span is read, with its surplus slots masked, if it has at most this many times the slots that a step
needs. Gathering them instead would read, write and read every key."""


class Slots(NamedTuple):
    """Cache slots of one pass over W positions."""

    write: slice | Tensor
    """The W slots of the new keys."""
    read: slice | Tensor
    """The R slots that are read."""
    bias: Tensor | None
    """-inf where a position may not attend to a slot, otherwise 0, (W, R); None if all may attend to all."""


class StepSlots:
    """Cache slots of every step under one mask.

    Args:
        mask: The mask.
        window: Largest number of positions W of a pass.
        device: Device of the cache.
        dtype: Dtype of the scores.
    """

    def __init__(self, mask: Mask, window: int, device: torch.device, dtype: torch.dtype) -> None:
        self.plan = mask.cache_plan(window)
        self.device, self.dtype = device, dtype
        self._cached: dict[tuple[int, int], tuple[slice | Tensor, slice | Tensor, bool]] = {}

    def at(self, step: int | Tensor, count: int = 1) -> Slots:
        """Slots of ``count`` positions from ``step`` on; a step given as int64 (1,) on the device is one position."""
        if isinstance(step, Tensor):
            return self._at_tensor(step)
        if (step, count) not in self._cached:
            self._cached[step, count] = self._find(step, count)
        write, read, partly = self._cached[step, count]
        # A view of the complete bias: that of a window is large, and steps share most of it.
        return Slots(write, read, self._bias[step : step + count, read] if partly else None)

    def _find(self, step: int, count: int) -> tuple[slice | Tensor, slice | Tensor, bool]:
        """Slots to write, slots to read, and whether some position may not attend to some of the latter."""
        allowed = self._allowed[step : step + count]
        read = _as_slice(allowed.any(0).nonzero().flatten(), IN_PLACE)
        write = _as_slice(self.plan.slot_of_key[step : step + count], 1)
        return self._moved(write), self._moved(read), not bool(allowed[:, read].all())

    def _at_tensor(self, step: Tensor) -> Slots:
        write, read, bias = self._tables
        reads = slice(None) if read is None else read.index_select(0, step).squeeze(0)
        return Slots(write.index_select(0, step), reads, bias.index_select(0, step))

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Slot that each step writes (N,), slots that it reads (N, R), or None for all, and its bias (N, R)."""
        plan = self.plan
        write = plan.slot_of_key.to(self.device)
        if plan.num_slots > IN_PLACE * plan.valid.shape[1]:
            return write, plan.read_slots.to(self.device), self._additive(plan.valid)
        return write, None, self._bias

    @cached_property
    def _allowed(self) -> Tensor:
        """Whether each step attends to each slot, bool (N, S) on the CPU."""
        plan = self.plan
        allowed = torch.zeros(len(plan.slot_of_key), plan.num_slots, dtype=torch.bool, device="cpu")
        return allowed.scatter_(1, plan.read_slots, True)  # padding repeats the step's own slot

    @cached_property
    def _bias(self) -> Tensor:
        """`_allowed` as a bias of the scores, (N, S)."""
        return self._additive(self._allowed)

    def _additive(self, allowed: Tensor) -> Tensor:
        bias = torch.zeros(allowed.shape, dtype=self.dtype, device="cpu").masked_fill_(~allowed, -math.inf)
        return bias.to(self.device)

    def _moved(self, slots: slice | Tensor) -> slice | Tensor:
        return slots if isinstance(slots, slice) else slots.to(self.device)


def _as_slice(slots: Tensor, excess: int) -> slice | Tensor:
    """The slice that slots span, or the slots if it has more than ``excess`` times as many or they do not ascend."""
    span = slice(int(slots[0]), int(slots[-1]) + 1)
    ascend = bool((slots.diff() > 0).all())
    return span if ascend and span.stop - span.start <= excess * len(slots) else slots


@lru_cache(maxsize=64)
def _step_slots(mask: Mask, window: int, device: torch.device, dtype: torch.dtype) -> StepSlots:
    """Computes the slots once per mask, not once per call."""
    return StepSlots(mask, window, device, dtype)


class LayerCache:
    """Caches text keys once per prompt and image keys once per candidate.

    The image part holds as many slots as the mask's cache plan needs (33 for a row mask on a 32-wide grid).

    Args:
        mask: Mask of the layer.
        text_key: Keys of the text prefix, (P, H, T, D).
        text_value: Values of the text prefix, (P, H, T, D).
        num_candidates: Candidates n of each prompt.
        text_mask: False at padding, to which the image must not attend, bool (P, T). Defaults to all True.
        window: Largest number of positions W of one call. Defaults to 1.
    """

    def __init__(
        self,
        mask: Mask,
        text_key: Tensor,
        text_value: Tensor,
        num_candidates: int,
        text_mask: Tensor | None = None,
        window: int = 1,
    ) -> None:
        self.slots = _step_slots(mask, window, text_key.device, text_key.dtype)
        prompts, heads, text, size = text_key.shape
        self.num_candidates, self.text_length = num_candidates, text
        # Copies: a view of the projection's output would keep its queries in memory.
        self.text_key = text_key.flatten(0, 1).contiguous()
        self.text_value = text_value.flatten(0, 1).contiguous()
        self.text_padding = None if text_mask is None else ~text_mask[:, None, None]
        shape = (prompts, heads, num_candidates, self.slots.plan.num_slots, size)
        self.key, self.value = text_key.new_zeros(2, *shape).unbind(0)

    @property
    def num_bytes(self) -> int:
        """Memory of the image part, bytes."""
        return self.key.numel() * self.key.element_size() * 2

    def attend(self, step: int | Tensor | Slots, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stores new keys and values, then mixes the values that the mask allows. It has no backward pass.

        One softmax runs over text and image keys together (appendix B.1, footnote 7).

        Args:
            step: First image position of the call, as for `StepSlots.at`, or its slots.
            query: Queries of W positions of every candidate, (P, H, n * W, D).
            key: Keys, same shape.
            value: Values, same shape.

        Returns:
            Mixed values, (P, H, n * W, D).
        """
        prompts, heads, rows, size = query.shape
        count = rows // self.num_candidates
        write, read, bias = step if isinstance(step, Slots) else self.slots.at(step, count)
        shape = (prompts, heads, self.num_candidates, count, size)
        self.key[:, :, :, write] = key.view(shape)
        self.value[:, :, :, write] = value.view(shape)
        query = (query.contiguous() / math.sqrt(size)).flatten(0, 1)
        text_scores = torch.bmm(query, self.text_key.transpose(1, 2))  # (P H, n W, T)
        if self.text_padding is not None:
            text_scores.view(prompts, heads, rows, -1).masked_fill_(self.text_padding, -math.inf)
        # Keys times queries, not queries times keys: for one query this is faster if the keys are a part of a buffer.
        queries = query.view(-1, count, size).transpose(1, 2)
        image_scores = torch.bmm(_take(self.key, read), queries).transpose(1, 2)  # (P H n, W, R)
        if bias is not None:
            image_scores = image_scores + bias
        scores = torch.cat([text_scores, image_scores.reshape(len(query), rows, -1)], -1)
        weights = scores.softmax(-1)
        mixed = torch.bmm(weights[..., : self.text_length], self.text_value)
        image_weights = weights.view(-1, count, weights.shape[-1])[..., self.text_length :]
        mixed += torch.bmm(image_weights, _take(self.value, read)).view_as(mixed)
        return mixed.view(prompts, heads, rows, size)


def _take(buffer: Tensor, read: slice | Tensor) -> Tensor:
    """Selects slots: (P, H, n, S, D) to (P H n, R, D)."""
    flat = buffer.flatten(0, 2)
    return flat[:, read] if isinstance(read, slice) else flat.index_select(1, read)
