"""Words that a model never saw: found in prompts, said in one line, stored with the tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dalle_zoo.tokenizers import BPETokenizer, ByteTokenizer, load_text_tokenizer
from dalle_zoo.tokenizers.words import MOST_WORDS, WORDS_FILE, count_words, note_unknown, unknown_note

CAPTIONS = ["a red apple", "A cat on a blue background", "two rockets, 3d style", "a t-rex"]
WORDS = count_words(CAPTIONS)


def test_words_are_counted_once_per_caption() -> None:
    assert WORDS is not None
    assert next(iter(WORDS.items())) == ("a", 3)
    assert {"3d", "t-rex", "rockets", "style", "cat"} <= set(WORDS)
    assert count_words(f"word{i}" for i in range(MOST_WORDS + 1)) is None


@pytest.mark.parametrize("prompt", [*CAPTIONS, "A RED cat!", "two apple, blue"])
def test_known_words_are_no_news(prompt: str) -> None:
    assert unknown_note(prompt, WORDS) == ""


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a red wizard", ["the model never saw the word 'wizard'"]),
        ("a rad rocket", ["words 'rad'", "'rocket' (did you mean 'rockets'?)"]),
        ("ein roter Apfel", ["'ein', 'roter', 'apfel'", "knows none of the prompt", "among its words are 'apple'"]),
        ("красная кошка", ["'красная', 'кошка'", "none of the prompt"]),
        ("🍎", ["'🍎'", "none of the prompt"]),
        ("", ["has no words"]),
        (" ?! ", ["has no words"]),
    ],
)
def test_unknown_words_are_named(prompt: str, parts: list[str]) -> None:
    note = unknown_note(prompt, WORDS)
    assert "\n" not in note
    assert [part for part in parts if part not in note] == [], note


@pytest.mark.parametrize(
    ("prompt", "note"),
    [
        ("a cat", ""),
        ("a king", "prompt 'a king': the model hardly saw the word 'king'"),
        ("King, king and queen", "prompt 'King, king and queen': the model hardly saw the words 'king', 'queen'"),
        (
            "a king and emu",
            "prompt 'a king and emu': the model never saw the word 'emu', and hardly saw the word 'king'",
        ),
    ],
)
def test_rare_words_are_named(prompt: str, note: str) -> None:
    words = {"a": 10_000, "and": 5_000, "cat": 3, "king": 2, "queen": 1}
    assert unknown_note(prompt, words) == note


def test_without_recorded_words_only_emptiness_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        note_unknown(["a wizard", "", ""], None)
    assert caplog.messages == ["prompt '' has no words: the images show anything that the model knows"]


def test_words_are_stored_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train(CAPTIONS, vocab_size=260)
    tokenizer.save(tmp_path / "without")
    assert not (tmp_path / "without" / WORDS_FILE).exists()
    assert load_text_tokenizer(tmp_path / "without").words is None
    tokenizer.words = WORDS
    tokenizer.save(tmp_path / "with")
    loaded = load_text_tokenizer(tmp_path / "with")
    assert loaded.words == WORDS
    loaded.save(tmp_path / "again")
    assert load_text_tokenizer(tmp_path / "again").words == WORDS
    assert ByteTokenizer().words is None  # a class attribute that no instance has changed
