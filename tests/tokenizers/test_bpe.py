"""The trainable BPE and its seeded dropout."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dalle_zoo.tokenizers import BPETokenizer, HFTokenizer
from dalle_zoo.tokenizers.bpe_dropout import DropoutMerger

# Words, scripts, joiners, combining marks, control characters, odd spaces, long runs.
ODD = [
    "it's a DOG, isn't it?  50% off; e-mail: x@y.zz",
    "Größe ÉCOLE naïve İstanbul ΣΊΣΥΦΟΣ J\u030cx",
    "e\u0301 = é, \u212b = Å, \ufb01sh",
    "日本語の写真 คนไทย हिन्दी العربية",
    "👩‍🍳🍎🏳️‍🌈 emoji🍏inside",
    "tab\tnew\nline\u00a0nbsp\u3000wide\u2028sep \x00\x07\x7f",
    "a" * 300,
    "motorcycle" * 30,
    "<|endoftext|> [PAD] Ġ Ċ ĠĠ",
    " leading and trailing ",
    "\n\t ",
]


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    corpus = [f"a photo of a motorcycle beside {n} umbrellas and an apple" for n in range(30)]
    return BPETokenizer.train([*corpus, *ODD, *ODD], vocab_size=500)


def test_merger_without_dropout_equals_the_library(trained: BPETokenizer, captions: list[str]) -> None:
    random = Random(0)
    letters = [chr(random.randrange(0x20, 0xD000)) for _ in range(1000)] + list("abc é🍎\t") * 200
    noise = ["".join(random.choices(letters, k=random.randrange(1, 60))) for _ in range(1500)]
    for text in [*ODD, *captions, *noise]:
        assert trained._merge(text, 0.0, random) == trained.encode(text), text


def test_round_trip_gives_the_normalized_caption(trained: BPETokenizer) -> None:
    for text in ODD:
        normal = trained.decode(trained.encode(text))
        assert trained.encode(normal) == trained.encode(text)
        assert normal == normal.strip()
        assert "  " not in normal
    assert trained.decode(trained.encode("  A\tRED \n É\u0301cole 🍎 ")) == "a red é\u0301cole 🍎"
    assert trained.decode(trained.encode("E\u0301")) == "é"


def test_a_word_has_the_same_tokens_at_every_position(trained: BPETokenizer) -> None:
    first, later = trained.encode("motorcycle"), trained.encode("a motorcycle")
    assert later[-len(first) :] == first


def test_dropout_changes_tokens_but_not_text(trained: BPETokenizer) -> None:
    for text in ODD:
        normal = trained.decode(trained.encode(text))
        for seed in range(5):
            ids = trained.encode(text, dropout=0.3, seed=seed)
            assert trained.decode(ids) == normal
            assert ids == trained.encode(text, dropout=0.3, seed=seed)


def test_ids_with_the_papers_dropout_vary_with_the_seed(trained: BPETokenizer, captions: list[str]) -> None:
    caption = "a photo of a motorcycle beside umbrellas"
    assert len({tuple(trained.encode(caption, dropout=0.1, seed=seed)) for seed in range(50)}) > 10


def test_length_grows_with_dropout(trained: BPETokenizer, captions: list[str]) -> None:
    def mean_length(dropout: float) -> float:
        encoded = [trained.encode(c, dropout=dropout, seed=i) for i, c in enumerate(captions)]
        return sum(map(len, encoded)) / len(encoded)

    lengths = [mean_length(dropout) for dropout in (0.0, 0.1, 0.3, 0.6, 1.0)]
    assert lengths == sorted(set(lengths))


def test_full_dropout_gives_bytes(trained: BPETokenizer) -> None:
    text = "a café 🍎"
    ids = trained.encode(text, dropout=1.0)
    assert len(ids) == len(f" {text}".encode())
    assert trained.decode(ids) == text


def test_dropout_has_the_distribution_of_the_algorithm() -> None:
    symbols = ["a", "b", "c", "d", "ab", "bc", "cd", "abc", "abcd"]
    merges = [("a", "b"), ("b", "c"), ("c", "d"), ("ab", "c"), ("ab", "cd")]
    merger, random = DropoutMerger({s: i for i, s in enumerate(symbols)}, merges), Random(0)
    dropout, num_samples = 0.3, 20_000

    def exact(word: list[str], weight: float, into: Counter[tuple[str, ...]]) -> None:
        """Every path of algorithm 1 with its probability, by recursion over the steps."""
        pairs = [(merges.index(p), i) for i, p in enumerate(pairwise(word)) if p in merges]
        for rank_among_them, (_, i) in enumerate(sorted(pairs)):
            merged = [*word[:i], word[i] + word[i + 1], *word[i + 2 :]]
            exact(merged, weight * dropout**rank_among_them * (1 - dropout), into)
        into[tuple(word)] += weight * dropout ** len(pairs)  # type: ignore[assignment]

    expected: Counter[tuple[str, ...]] = Counter()
    exact(list("abcd"), 1.0, expected)
    assert sum(expected.values()) == pytest.approx(1)
    sampled = Counter(tuple(symbols[i] for i in merger("abcd", dropout, random)) for _ in range(num_samples))
    assert sampled.keys() == expected.keys()
    for split, probability in expected.items():
        four_sigma = 4 * (probability * (1 - probability) / num_samples) ** 0.5
        assert sampled[split] / num_samples == pytest.approx(probability, abs=four_sigma), split


def test_time_of_a_long_word_is_not_quadratic(trained: BPETokenizer) -> None:
    text = "motorcycle" * 20_000  # takes seconds or minutes if each merge scans the complete word
    assert trained.decode(trained.encode(text, dropout=0.1)) == text


def test_training_is_deterministic_in_any_order_and_process(captions: list[str]) -> None:
    native = BPETokenizer.train(captions[::-1], vocab_size=300).files()["tokenizer.json"]
    program = """
import json, sys
from dalle_zoo.tokenizers import BPETokenizer
sys.stdout.write(BPETokenizer.train(json.load(sys.stdin), 300).files()["tokenizer.json"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(captions),
        env=os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout == native


def test_a_smaller_vocabulary_than_requested_is_logged(captions: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert BPETokenizer.train(captions, vocab_size=300).vocab_size == 300
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "dalle_zoo"):
        small = BPETokenizer.train(iter(captions))
    assert 256 < small.vocab_size < 16384
    assert f"a vocabulary of only {small.vocab_size} ids, not 16384" in caplog.text


def test_smallest_vocabulary_is_bytes(captions: list[str]) -> None:
    tokenizer = BPETokenizer.train(captions, vocab_size=256)
    assert len(tokenizer.encode("apple")) == len(" apple")


def test_invalid_training_input_raises() -> None:
    with pytest.raises(ValueError, match=r"vocab_size must be at least 256, .* got 255"):
        BPETokenizer.train(["a"], vocab_size=255)
    with pytest.raises(ValueError, match="captions is empty"):
        BPETokenizer.train([])
    with pytest.raises(TypeError, match="got a string: put it into a list"):
        BPETokenizer.train("a red apple")
    with pytest.raises(TypeError, match="caption 1 must be a str, got NoneType"):
        BPETokenizer.train(["a", None])  # type: ignore[list-item]


def test_dropout_in_a_file_is_switched_off(trained: BPETokenizer) -> None:
    external = Tokenizer.from_str(trained.files()["tokenizer.json"])
    external.model.dropout = 0.5
    for opened in (BPETokenizer(external), HFTokenizer(Tokenizer.from_str(external.to_str()))):
        assert json.loads(opened.files()["tokenizer.json"])["model"]["dropout"] is None
        assert opened.encode("a motorcycle") == trained.encode("a motorcycle")


def test_unsupported_models_raise(trained: BPETokenizer) -> None:
    with_token = Tokenizer.from_str(trained.files()["tokenizer.json"])
    with_token.add_special_tokens(["<pad>"])
    suffix = Tokenizer(models.BPE(vocab={"a": 0}, merges=[], end_of_word_suffix="</w>"))
    for wrong in (with_token, suffix, Tokenizer(models.WordLevel({"a": 0}, "a"))):
        with pytest.raises(ValueError, match="open it with HFTokenizer"):
            BPETokenizer(wrong)


def byte_level() -> Tokenizer:
    """A byte-level BPE without a normalizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a red apple"] * 9, trainer)
    return tokenizer


def test_a_tokenizer_without_a_normalizer_has_dropout_too() -> None:
    tokenizer = BPETokenizer(byte_level())
    assert tokenizer.encode("A red  apple", dropout=1e-9, seed=1) == tokenizer.encode("A red  apple")
    ids = tokenizer.encode("a red apple", dropout=0.5, seed=1)
    assert len(ids) > len(tokenizer.encode("a red apple"))
    assert tokenizer.decode(ids).strip() == "a red apple"


def test_a_tokenizer_without_a_pre_tokenizer_is_refused() -> None:
    plain = byte_level()
    content = json.loads(plain.to_str()) | {"pre_tokenizer": None}
    with pytest.raises(ValueError, match="byte level: False"):
        BPETokenizer(Tokenizer.from_str(json.dumps(content)))


def test_training_names_a_caption_that_is_not_valid() -> None:
    with pytest.raises(ValueError, match=r"caption 'half \\ud83d' is not valid Unicode"):
        BPETokenizer.train(["whole", "half \ud83d"], vocab_size=256)
