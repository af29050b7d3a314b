"""Sheets: each image in its tile, above its caption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dalle_zoo_eval.sheets import comparison_sheet


def test_images_and_captions_are_in_their_tiles() -> None:
    left = torch.zeros(3, 3, 16, 16)
    right = torch.ones(3, 3, 16, 16) * torch.tensor([1.0, 0, 0])[:, None, None]
    words = ["one", "two " * 40, "three"]
    sheet = np.asarray(comparison_sheet(left, right, captions=words, columns=2, scale=2))
    assert (sheet[10:42, 10:42] == 0).all()
    assert (sheet[10:42, 45:77] == [255, 0, 0]).all()
    below = sheet[42:84, 10:77]
    assert (below < 128).any()  # ink of the caption
    assert len(sheet) == 2 * (32 + 42 + 10) + 10  # two rows


def test_wrong_number_of_captions_raises() -> None:
    with pytest.raises(ValueError, match="one per caption"):
        comparison_sheet(torch.zeros(2, 3, 8, 8), captions=["one"])
