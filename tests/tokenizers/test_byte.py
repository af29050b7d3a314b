"""Bytes as ids."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models

from dalle_zoo.tokenizers import ByteTokenizer

TEXTS = ["A  Red\tApple ", "Größe 🍎👩‍🍳", "\x00\x7f\u0100Ġ<0x41>", "日本" * 50]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_bytes(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_character_round_trips() -> None:
    text = "".join(chr(c) for c in range(0x11000) if not 0xD800 <= c < 0xE000)
    assert ByteTokenizer().encode(text) == list(text.encode())


@pytest.mark.parametrize("length", range(12))
def test_incomplete_bytes_decode_like_python(length: int) -> None:
    data = "aé🍎z日".encode()[:length]
    assert ByteTokenizer().decode(data) == data.decode(errors="replace")


def test_a_tokenizer_with_other_ids_raises() -> None:
    with pytest.raises(ValueError, match="not the 256 bytes"):
        ByteTokenizer(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
