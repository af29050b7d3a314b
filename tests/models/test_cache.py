"""Where passes write and read: against the mask itself, and in little memory."""

from __future__ import annotations

import pytest
import torch

from dalle_zoo.masks import MASKS, Mask, TextImageLayout
from dalle_zoo.models.cache import Places

CPU = torch.device("cpu")
LAYOUT = TextImageLayout(text=2, height=6, width=5)


@pytest.mark.parametrize("window", [1, 3, 30])
@pytest.mark.parametrize("spec", MASKS)
def test_a_window_reads_what_its_mask_allows(spec: str, window: int) -> None:
    mask = Mask.from_spec(spec, LAYOUT)
    places = Places(mask, window, CPU, torch.float32)
    image = mask.dense()[LAYOUT.text :, LAYOUT.text :]
    held = torch.full((places.plan.num_slots,), -1)  # the key in each slot
    for step in range(LAYOUT.image - window + 1):
        write, read, bias = places.at(step, window)
        held[write] = torch.arange(step, step + window)
        slots = held[read]
        for row, allowed in enumerate(image[step : step + window]):
            taken = slots if bias is None else slots[bias[row] == 0]
            assert sorted(taken.tolist()) == allowed.nonzero().flatten().tolist()


def test_windows_share_one_bias() -> None:
    window = 4
    places = Places(Mask.from_spec("full", LAYOUT), window, CPU, torch.float32)
    biases = [places.at(step, window).bias for step in range(LAYOUT.image - window)]
    assert len({bias.untyped_storage().data_ptr() for bias in biases if bias is not None}) == 1
    assert all(bias is not None for bias in biases)
