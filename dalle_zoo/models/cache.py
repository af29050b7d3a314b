"""Keys and values of one layer while pictures are drawn: static buffers, sized by what the mask still reads."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from dalle_zoo.masks import Mask

# P prompts, n candidates of each, H heads, D head size, T text positions, S slots of the cache plan


class LayerCache:
    """Text keys once a prompt, image keys once a candidate.

    The image part holds as many slots as the mask's cache plan needs (33 for a row mask on a 32-wide grid), and a
    step reads only the slots that its mask allows. The text part is shared by all candidates of a prompt.

    Args:
        mask: Mask of the layer.
        text_key: Keys of the text prefix, (P, H, T, D).
        text_value: Values, same shape.
        num_candidates: Candidates n of each prompt.
        readable: Which text positions the image may read, bool (P, T); all if missing.
    """

    def __init__(
        self,
        mask: Mask,
        text_key: Tensor,
        text_value: Tensor,
        num_candidates: int,
        readable: Tensor | None = None,
    ) -> None:
        plan = mask.cache_plan()
        prompts, heads, _, size = text_key.shape
        self.text_key, self.text_value = text_key, text_value
        self.unreadable = None if readable is None else ~readable[:, None, None]
        buffer = text_key.new_zeros(2, prompts, heads, num_candidates, plan.num_slots, size)
        self.key, self.value = buffer.unbind(0)
        self.slot_of_key, self.reads = _steps(mask, text_key.device)

    @property
    def num_bytes(self) -> int:
        """Memory of the image part."""
        return self.key.numel() * self.key.element_size() * 2

    def attend(self, step: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stores the new key and value, then mixes what the mask of this step allows.

        One softmax runs over text and image keys together (appendix B.1, footnote 7).

        Args:
            step: Image position, 0 … N - 1.
            query: (P, H, n, D).
            key: The same shape.
            value: The same shape.

        Returns:
            Mixed values, (P, H, n, D).
        """
        slot, reads = self.slot_of_key[step], self.reads[step]
        self.key[:, :, :, slot] = key
        self.value[:, :, :, slot] = value
        image_key, image_value = self.key[:, :, :, reads], self.value[:, :, :, reads]
        query = query / math.sqrt(query.shape[-1])
        text_scores = query @ self.text_key.transpose(-1, -2)  # (P, H, n, T)
        if self.unreadable is not None:
            text_scores = text_scores.masked_fill(self.unreadable, -math.inf)
        image_scores = (image_key @ query.unsqueeze(-1)).squeeze(-1)  # (P, H, n, S)
        scores = torch.cat([text_scores, image_scores], -1).float()
        weights = scores.softmax(-1).to(value.dtype)
        text = self.text_key.shape[-2]
        text_weights, image_weights = weights[..., :text], weights[..., text:]
        mixed: Tensor = (image_weights.unsqueeze(-2) @ image_value).squeeze(-2)
        return mixed + text_weights @ self.text_value


@lru_cache(maxsize=64)
def _steps(mask: Mask, device: torch.device) -> tuple[list[int], list[slice | Tensor]]:
    """Slot that each step writes, and slots that it reads; worked out once a mask, not once a call."""
    plan = mask.cache_plan()
    reads = [_as_slice(slots[valid]) for slots, valid in zip(plan.read_slots, plan.valid, strict=True)]
    return plan.slot_of_key.tolist(), [r if isinstance(r, slice) else r.to(device) for r in reads]


def _as_slice(slots: Tensor) -> slice | Tensor:
    """Consecutive slots as a slice, which reads without a copy."""
    ordered = slots.sort().values  # attention does not depend on the order of keys
    first, count = int(ordered[0]), len(ordered)
    if int(ordered[-1]) - first + 1 == count:
        return slice(first, first + count)
    return ordered
