"""Batches of captions: padding, truncation, errors, seeds."""

from __future__ import annotations

import logging

import pytest
import torch

from dalle_zoo.tokenizers import BPETokenizer, ByteTokenizer, CaptionEncoder


def test_ids_are_followed_by_padding_of_the_position() -> None:
    batch = CaptionEncoder(ByteTokenizer(), 4)(["ab", "", "abcd"])
    assert batch.dtype == torch.int64
    assert batch.tolist() == [[97, 98, 258, 259], [256, 257, 258, 259], [97, 98, 99, 100]]
    assert CaptionEncoder(ByteTokenizer(), 4)([]).shape == (0, 4)


def test_truncation_is_counted_and_logged_at_powers_of_ten(caplog: pytest.LogCaptureFixture) -> None:
    encoder = CaptionEncoder(ByteTokenizer(), 3)
    with caplog.at_level(logging.WARNING, "dalle_zoo"):
        assert encoder(["abc", "wxyz" + 100 * "!"]).tolist() == [[97, 98, 99], [119, 120, 121]]
    assert encoder.num_truncated == 1
    (message,) = caplog.messages
    assert message.startswith("captions truncated to 3 tokens: 1 so far, 1 in this batch, the first 'wxyz!")
    assert message.endswith("!…' with 104")
    counts = []
    for _ in range(60):
        caplog.clear()
        encoder(["abcd", "abcd", "a"])
        counts += [encoder.num_truncated] * len(caplog.messages)
    assert encoder.num_truncated == 121
    assert counts == [11, 101]


def test_counters_are_separate() -> None:
    one, other = CaptionEncoder(ByteTokenizer(), 1), CaptionEncoder(ByteTokenizer(), 1)
    one(["ab"])
    assert (one.num_truncated, other.num_truncated) == (1, 0)


def test_the_error_for_a_long_caption_names_length_and_limit() -> None:
    encoder = CaptionEncoder(ByteTokenizer(), 3, overlong="error")
    assert encoder(["abc"]).tolist() == [[97, 98, 99]]
    with pytest.raises(ValueError, match="caption 'abcd' has 4 tokens, the limit is 3"):
        encoder(["abc", "abcd"])
    assert encoder.num_truncated == 0


def test_dropout_follows_the_seed_not_the_batch(captions: list[str]) -> None:
    tokenizer = BPETokenizer.train(captions, 300)
    encoder = CaptionEncoder(tokenizer, 64, dropout=0.3)
    seeds = list(range(len(captions)))
    complete = encoder(captions, seeds)
    rows = [encoder([c], [s]) for c, s in zip(captions[::-1], seeds[::-1], strict=True)]
    assert torch.equal(complete, torch.cat(rows[::-1]))
    assert not torch.equal(complete, encoder(captions, seeds[::-1]))
    assert [tokenizer.decode(row) for row in complete] == captions
    plain = CaptionEncoder(tokenizer, 64)
    assert torch.equal(plain(captions, seeds), plain(captions))


def test_invalid_arguments_raise(captions: list[str]) -> None:
    tokenizer = BPETokenizer.train(captions, 256)
    with pytest.raises(ValueError, match="length must be an integer of at least 1, got 0"):
        CaptionEncoder(tokenizer, 0)
    with pytest.raises(ValueError, match=r"unknown overlong 'truncat'\. Did you mean 'truncate'"):
        CaptionEncoder(tokenizer, 8, overlong="truncat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dropout must be in 0\.\.1, got -0\.1"):
        CaptionEncoder(tokenizer, 8, dropout=-0.1)
    encoder = CaptionEncoder(tokenizer, 8, dropout=0.1)
    with pytest.raises(ValueError, match="needs seeds"):
        encoder(["a"])
    with pytest.raises(ValueError, match="one per caption, got 1 for 2"):
        encoder(["a", "b"], [0])
    with pytest.raises(TypeError, match="got a single caption: pass \\['a cat'\\]"):
        encoder("a cat")
    with pytest.raises(TypeError, match="caption must be a str, got NoneType"):
        CaptionEncoder(tokenizer, 8)([None])  # type: ignore[list-item]
