"""Bars side by side."""

from __future__ import annotations

from io import BytesIO

import pytest
from dalle_zoo_eval.plots import bar_figure
from PIL import Image

BARS = {"$right$": {"train": 0.0, "_val": 2.5}, "none": {"train": 1.0, "_val": 3.0}}


def test_equal_bars_give_equal_files() -> None:
    png = bar_figure(BARS, title="$t$", score="bits")
    with Image.open(BytesIO(png)) as image:
        assert image.width > image.height
        assert len(image.convert("RGB").getcolors(1 << 20)) > 2  # more than ink on paper
    assert png == bar_figure(BARS, title="$t$", score="bits")
    assert png != bar_figure({**BARS, "none": {"train": 1.0, "_val": 3.5}}, title="$t$", score="bits")


@pytest.mark.parametrize(
    "bars",
    [{}, {"a": {}}, {"a": {"x": 1.0}, "b": {"y": 1.0}}, {str(number): {"x": 1.0} for number in range(6)}],
)
def test_inconsistent_bars_raise(bars: dict[str, dict[str, float]]) -> None:
    with pytest.raises(ValueError, match="one to 5 kinds of bars, each with a height in the same groups"):
        bar_figure(bars, title="t", score="s")
