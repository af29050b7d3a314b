"""A tokenizer of every registered kind, made offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dalle_zoo.tokenizers import (
    TEXT_TOKENIZERS,
    BPETokenizer,
    CLIPTokenizer,
    DalleMiniTokenizer,
    HFTokenizer,
    TextTokenizer,
)
from dalle_zoo.tokenizers.clip import clip_bpe
from dalle_zoo.tokenizers.dalle_mini import bart_bpe
from dalle_zoo.tokenizers.library import LibraryTokenizer

COLORS = ["red", "green", "blue", "yellow", "violet"]
THINGS = ["apple", "motorcycle", "penguin", "umbrella", "telescope"]
STYLES = ["photo", "tiny emoji"]
CAPTIONS = [f"a {s} of a {c} {t}" for s in STYLES for c in COLORS for t in THINGS]


@cache
def bpe() -> BPETokenizer:
    return BPETokenizer.train(CAPTIONS, vocab_size=320)


@cache
def hf() -> HFTokenizer:
    words = {word for caption in CAPTIONS for word in caption.split()}
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i + 1 for i, w in enumerate(sorted(words))}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return HFTokenizer(tokenizer)


@cache
def dalle_mini() -> DalleMiniTokenizer:
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learned.train_from_iterator(CAPTIONS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    model = json.loads(learned.to_str())["model"]
    merges = [(first, second) for first, second in model["merges"]]
    return DalleMiniTokenizer(bart_bpe(model["vocab"], merges, simplified=True))


@cache
def clip() -> CLIPTokenizer:
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learned.train_from_iterator(CAPTIONS, trainers.BpeTrainer(vocab_size=120, end_of_word_suffix="</w>"))
    merges = json.loads(learned.to_str())["model"]["merges"]
    return CLIPTokenizer(clip_bpe([(first, second) for first, second in merges]))


MAKERS: dict[str, Callable[[], TextTokenizer]] = {
    "bpe": bpe,
    "clip": clip,
    "dalle_mini": dalle_mini,
    "hf": hf,
}


@pytest.fixture(params=list(TEXT_TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    """Each registered kind; one whose constructor needs arguments has a function in MAKERS."""
    make = MAKERS.get(request.param) or TEXT_TOKENIZERS[request.param]
    return make()


@pytest.fixture
def library_tokenizer(tokenizer: TextTokenizer) -> LibraryTokenizer:
    """Each registered kind that the `tokenizers` library runs."""
    if not isinstance(tokenizer, LibraryTokenizer):
        pytest.skip(f"{tokenizer.kind} has no tokenizer.json")
    return tokenizer


@pytest.fixture
def captions() -> list[str]:
    """Lower-case captions that every kind decodes unchanged."""
    return CAPTIONS


@pytest.fixture
def saved(tokenizer: TextTokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"
