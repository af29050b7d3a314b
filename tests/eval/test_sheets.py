"""Sheets: each image in its tile, above its caption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dalle_zoo_eval.sheets import comparison_sheet

from dalle_zoo.fonts import font_for
from dalle_zoo.sheets import wrap_lines


def test_images_and_captions_are_in_their_tiles() -> None:
    left = torch.zeros(3, 3, 16, 16)
    right = torch.ones(3, 3, 16, 16) * torch.tensor([1.0, 0, 0])[:, None, None]
    words = ["one", "two " * 40, "three"]
    sheet = np.asarray(comparison_sheet(left, right, captions=words, columns=2, scale=2))
    assert (sheet[10:42, 10:42] == 0).all()
    assert (sheet[10:42, 45:77] == [255, 0, 0]).all()
    below = sheet[42:84, 10:77]
    assert (below < 128).any()  # ink of the caption
    assert len(sheet) == 2 * (32 + 6 * 14 + 10) + 10  # two rows with captions of six lines


def test_captions_of_small_images_fit_and_a_title_is_above() -> None:
    """A caption of the usual length is complete below an image of 28 pixels."""
    images = torch.zeros(2, 3, 28, 28)
    caption = "a small bird with a red head and a white belly sits on a branch"
    plain = comparison_sheet(images, captions=[caption, "x"], scale=1)
    titled = comparison_sheet(images, captions=[caption, "x"], scale=1, title="left generated, right real")
    font, text = font_for(caption, 11)
    assert " ".join(wrap_lines(text, font, 110, 6)) == caption
    assert titled.height == plain.height + 24
    assert np.array_equal(np.asarray(titled)[24 + 10 :], np.asarray(plain)[10:])
    assert (np.asarray(titled)[:24] < 128).any()


def test_wrong_number_of_captions_raises() -> None:
    with pytest.raises(ValueError, match="one per caption"):
        comparison_sheet(torch.zeros(2, 3, 8, 8), captions=["one"])
