"""A tokenizer of every registered kind, made offline."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from dalle_zoo.tokenizers import (
    TEXT_TOKENIZERS,
    BPETokenizer,
    ByteTokenizer,
    HFTokenizer,
    TextTokenizer,
)

COLOURS = ["red", "green", "blue", "yellow", "violet"]
THINGS = ["apple", "motorcycle", "penguin", "umbrella", "telescope"]
STYLES = ["photo", "3d emoji"]
CAPTIONS = [f"a {s} of a {c} {t}" for s in STYLES for c in COLOURS for t in THINGS]


@cache
def bpe() -> BPETokenizer:
    return BPETokenizer.train(CAPTIONS, vocab_size=320)


@cache
def hf() -> HFTokenizer:
    words = {word for caption in CAPTIONS for word in caption.split()}
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i + 1 for i, w in enumerate(sorted(words))}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return HFTokenizer(tokenizer)


MAKERS: dict[str, Callable[[], TextTokenizer]] = {"bpe": bpe, "byte": ByteTokenizer, "hf": hf}


@pytest.fixture(params=list(TEXT_TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    """Each registered kind in turn; a new kind needs a line in MAKERS."""
    return MAKERS[request.param]()


@pytest.fixture
def captions() -> list[str]:
    """Lower-case captions that every kind gives back unchanged."""
    return CAPTIONS


@pytest.fixture
def saved(tokenizer: TextTokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"
