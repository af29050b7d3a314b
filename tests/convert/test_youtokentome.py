"""Vocabularies of YouTokenToMe; tests/models/external/test_rudalle.py compares the ids with the package."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.convert.youtokentome import is_vocabulary, read_vocabulary
from dalle_zoo.tokenizers import load_text_tokenizer

GOLDEN = Path(runpy.run_path(str(Path(__file__).parents[1] / "golden/rudalle.py"))["VOCABULARY"])
SMALL = "3 2\n9601 4\n97 5\n98 6\n4 5 7\n7 6 8\n1 0 2 3\n"  # ▁ a b, ▁+a, ▁a+b


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_merges_are_applied_in_their_order(tmp_path: Path) -> None:
    path = write(tmp_path / "small", SMALL + "\n")  # an additional empty line is allowed
    assert is_vocabulary(path)
    tokenizer = read_vocabulary(path)
    assert tokenizer.vocab_size == 9
    assert tokenizer.encode("ab ba  aab") == [8, 4, 6, 5, 7, 5, 6]
    assert tokenizer.encode("xyab▁z") == [4, 1, 5, 6, 4, 1], "unknown characters in a row are one token"
    assert tokenizer.encode("") == tokenizer.encode(" ▁\t") == []
    assert tokenizer.decode([8, 4, 6, 5]) == "ab ba"


def test_a_saved_vocabulary_loads_equal(tmp_path: Path) -> None:
    tokenizer = read_vocabulary(GOLDEN)
    tokenizer.save(tmp_path)
    caption = "рыжий котик,  cyberpunk 🐈"
    assert load_text_tokenizer(tmp_path).encode(caption) == tokenizer.encode(caption)


@pytest.mark.parametrize("text", ["", "a text", "1 2\n", "3 2\n9601 4\n", '{"a": 1}'])
def test_other_files_are_not_recognized(text: str, tmp_path: Path) -> None:
    assert not is_vocabulary(write(tmp_path / "other", text))
    assert is_vocabulary(write(tmp_path / "small", SMALL))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("3 2\n", "3 3\n", "does not hold its 3 characters and 3 merges"),
        ("3 2\n", "4 1\n", "does not hold its 4 characters and 1 merges"),
        ("3 2\n", "9 9\n", "does not hold its 9 characters and 9 merges"),
        ("1 0 2 3", "0 1 2 3", r"has the special tokens \[0, 1, 2, 3\], expected \[1, 0, 2, 3\]"),
        ("97 5", "55296 5", "has the character 55296, which is not in Unicode"),
        ("97 5", "999999999 5", "has the character 999999999"),
        ("7 6 8", "7 9 8", "merges 7 and 9, one of which is not defined before"),
        ("7 6 8", "4 5 8", "must give 9 different texts, including ▁, the ids 0 to 8"),
        ("7 6 8", "7 6 9", "must give 9 different texts, including ▁, the ids 0 to 8"),
        ("9601 4", "99 4", "including ▁"),
        ("7 6 8\n1 0 2 3\n", "7 6", "starts like a vocabulary of YouTokenToMe, but is truncated or damaged"),
        ("1 0 2 3\n", "1 0 2 3\nmore", "starts like a vocabulary of YouTokenToMe, but is truncated or damaged"),
    ],
)
def test_damaged_vocabularies_raise(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "small", SMALL.replace(old, new))
    assert is_vocabulary(path)
    with pytest.raises(WeightFileError, match=message):
        read_vocabulary(path)


def test_an_overlong_token_raises(tmp_path: Path) -> None:
    doubled = "".join(f"{token} {token} {token + 1}\n" for token in range(4, 60))
    with pytest.raises(WeightFileError, match="a token of more than 1000 characters"):
        read_vocabulary(write(tmp_path / "bomb", f"1 56\n9601 4\n{doubled}1 0 2 3\n"))
