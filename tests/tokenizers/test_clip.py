"""CLIP's text tokenizer gives the ids of the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dalle_zoo.tokenizers import CLIPTokenizer, load_text_tokenizer
from dalle_zoo.tokenizers.clip import clean, clip_bpe

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden/clip.json").read_text())
MERGES = [tuple(pair.split()) for pair in GOLDEN["merges"]]


@pytest.fixture(scope="module")
def clip() -> CLIPTokenizer:
    return CLIPTokenizer(clip_bpe(MERGES))


def test_ids_are_those_of_the_original(clip: CLIPTokenizer, tmp_path: Path) -> None:
    clip.save(tmp_path)
    back = load_text_tokenizer(tmp_path)
    for caption, ids in GOLDEN["ids"].items():
        assert clip.encode(caption) == ids, caption
        assert back.encode(caption) == ids, caption


def test_decoding_gives_the_cleaned_caption(clip: CLIPTokenizer) -> None:
    for caption in ("a painting of a cat with sunglasses", "Café “quotes”", "北京的一只猫"):
        assert clip.decode(clip.encode(caption)).replace(" ", "") == clean(caption).replace(" ", "")
    assert clip.decode(clip.encode("A  cat ")) == "a cat"


def test_special_tokens_have_the_last_ids(clip: CLIPTokenizer) -> None:
    assert clip.vocab_size == 512 + len(MERGES) + 2
    assert clip.encode("<|startoftext|><|endoftext|>") == [clip.vocab_size - 2, clip.vocab_size - 1]


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ([("a", "b"), ("a", "b")], "two merges form the same piece"),
        ([("ab", "c")], "these merges do not form a vocabulary"),
    ],
)
def test_invalid_merges_raise(merges: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip_bpe(merges)
