"""Cache slots that a pass writes and reads, compared with the mask; memory of their biases."""

from __future__ import annotations

import pytest
import torch

from dalle_zoo.masks import MASKS, Mask, TextImageLayout
from dalle_zoo.models.cache import StepSlots

CPU = torch.device("cpu")
LAYOUT = TextImageLayout(text=2, height=6, width=5)


@pytest.mark.parametrize("window", [1, 3, 30])
@pytest.mark.parametrize("spec", MASKS)
def test_a_window_reads_exactly_the_keys_that_the_mask_allows(spec: str, window: int) -> None:
    mask = Mask.from_spec(spec, LAYOUT)
    slots = StepSlots(mask, window, CPU, torch.float32)
    image = mask.dense()[LAYOUT.text :, LAYOUT.text :]
    held = torch.full((slots.plan.num_slots,), -1)  # the key in each slot
    for step in range(LAYOUT.image - window + 1):
        write, read, bias = slots.at(step, window)
        held[write] = torch.arange(step, step + window)
        keys = held[read]
        for row, allowed in enumerate(image[step : step + window]):
            taken = keys if bias is None else keys[bias[row] == 0]
            assert sorted(taken.tolist()) == allowed.nonzero().flatten().tolist()


def test_windows_share_the_memory_of_one_bias() -> None:
    window = 4
    slots = StepSlots(Mask.from_spec("full", LAYOUT), window, CPU, torch.float32)
    biases = [slots.at(step, window).bias for step in range(LAYOUT.image - window)]
    assert len({bias.untyped_storage().data_ptr() for bias in biases if bias is not None}) == 1
    assert all(bias is not None for bias in biases)
