"""Captions above their images: lines, widths, letters of all scripts."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageFont

from dalle_zoo import fonts
from dalle_zoo.fonts import font_for
from dalle_zoo.sheets import caption_sheet, fit_line, one_line, wrap_lines


def test_a_sheet_has_each_caption_above_its_images() -> None:
    images = torch.cat([torch.zeros(3, 3, 20, 20), torch.full((3, 3, 20, 20), 0.4)])
    sheet = np.array(caption_sheet(images, ["first", "second " * 30], columns=2))
    grid = 2 * (2 * 22 + 2)  # two rows at twice the size
    assert sheet.shape == (18 + grid + 3 * 18 + grid, grid, 3)
    for value, top, height in ((0, 0, 18), (102, 18 + grid, 3 * 18)):
        lines, tiles = np.split(sheet[top : top + height + grid], [height])
        for line in np.split(lines, height // 18):
            assert (line < 128).any(), "a caption is there"
            assert (line[:, -4:] == 255).all(), "and is not wider than its images"
        assert (tiles[4:44, 4:44] == value).all()
        assert (tiles[48:88, 48:88] == 255).all(), "three images leave one place"


WIDTH = 124
"""Width of a caption above one image of 64 pixels, twice as large."""


@pytest.mark.parametrize(
    ("caption", "line"),
    [
        ("a red\napple\ton\r\na table", "a red apple on a table"),
        ("a \ud800 b \x00", "a ? b ?"),
        ("", ""),
        ("\n", ""),
    ],
)
def test_a_caption_is_one_line(caption: str, line: str) -> None:
    assert one_line(caption) == line
    sheet = caption_sheet(torch.rand(1, 3, 64, 64), [caption], columns=1)
    assert sheet.size == (2 * 68, 2 * 68 + 18)


def test_a_long_caption_is_truncated_to_the_width() -> None:
    font = ImageFont.load_default(13)
    for caption in ("word " * 500, "i" * 500, "W" * 30):
        line = fit_line(caption, font, WIDTH)
        assert line.endswith("…")
        assert caption.startswith(line[:-1])
        longer = caption[: len(line)] + "…"
        assert font.getlength(line) <= WIDTH < font.getlength(longer)
    assert fit_line("a cat", font, WIDTH) == "a cat"
    assert fit_line("a cat", font, 2) == ""


def test_a_caption_of_many_words_is_measured_a_few_times() -> None:
    class Font:
        measured = 0

        def getlength(self, text: str) -> float:
            self.measured += len(text)
            return 8.0 * len(text)

    font = Font()
    assert fit_line("word " * 100_000, font, WIDTH) == "word word word…"
    assert font.measured < 1000, "letters that were measured"


# ------------------------------------------------------------ lines


def test_lines_break_between_words() -> None:
    font = ImageFont.load_default(13)
    text = "a red apple on a blue table next to a grinning face"
    lines = wrap_lines(text, font, WIDTH, 9)
    assert len(lines) > 2
    assert " ".join(lines) == text
    for line, following in itertools.pairwise(lines):
        assert font.getlength(line) <= WIDTH < font.getlength(f"{line} {following.split()[0]}")
    short = wrap_lines(text, font, WIDTH, 2)
    assert short[0] == lines[0]
    assert short[1].endswith("…")
    assert wrap_lines("", font, WIDTH, 3) == [""]
    assert wrap_lines("a cat", font, WIDTH, 3) == ["a cat"]


def test_a_word_longer_than_a_line_is_broken() -> None:
    font = ImageFont.load_default(13)
    lines = wrap_lines("x" * 60, font, WIDTH, 9)
    assert "".join(lines) == "x" * 60
    assert all(font.getlength(line) <= WIDTH for line in lines)
    assert wrap_lines("abc", font, 1, 2) == ["a", ""], "no letter fits"


# ------------------------------------------------------------ letters


def test_other_alphabets_have_a_font() -> None:
    for text in ("a red apple", "красное яблоко", "κόκκινο μήλο"):
        font, shown = font_for(text, 13)
        assert shown == text
        absent = bytes(font.getmask("\uffff"))
        assert all(bytes(font.getmask(letter)) != absent for letter in text if letter != " "), text


def test_letters_that_no_font_has_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fonts, "_installed", lambda: iter(["nowhere.ttf"]))
    with caplog.at_level(logging.WARNING):
        font, shown = font_for("りんご apple", 13)
    assert shown == "[U+308A][U+3093][U+3054] apple"
    assert caplog.messages == ["no installed font has U+3054, U+308A, U+3093: install one, such as Noto Sans"]
    assert font.getlength(shown) > 0


def test_the_font_that_lacks_the_fewest_letters_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = {"some.ttf": "aя", "all.ttf": "aяり", "bitmap.ttf": "aяりん", "none.ttf": "a"}
    monkeypatch.setattr(fonts, "_installed", lambda: iter(letters))
    monkeypatch.setattr(fonts, "_letters", lambda path: frozenset(map(ord, letters[path])))

    truetype = ImageFont.truetype

    def load(path: Any, size: int, **options: Any) -> Any:
        if not isinstance(path, str):  # Pillow's own font
            return truetype(path, size, **options)
        if path == "bitmap.ttf":
            raise OSError("invalid pixel size")
        return path

    monkeypatch.setattr(ImageFont, "truetype", load)
    assert font_for("a яりん", 13) == ("all.ttf", "a яり[U+3093]")
    assert font_for("a я", 13) == ("some.ttf", "a я")


def test_a_sheet_shows_different_letters() -> None:
    images = torch.rand(1, 3, 32, 32)
    first, second = (np.asarray(caption_sheet(images, [text], 1)) for text in ("яблоко", "ябочкл"))
    assert first.shape == second.shape
    assert not np.array_equal(first, second), "not one box per letter"
