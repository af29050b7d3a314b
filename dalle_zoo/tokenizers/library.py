"""Text tokenizers of the `tokenizers` library, completely described by ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

from dalle_zoo.tokenizers.base import TextTokenizer

TOKENIZER_FILE = "tokenizer.json"


def open_tokenizer_json(path: Path) -> Tokenizer:
    """Reads a ``tokenizer.json``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The library cannot read it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a file of the tokenizers library")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{path} is not a file of the tokenizers library ({error}): save the tokenizer again"
        ) from error


class LibraryTokenizer(TextTokenizer):
    """Base class of tokenizers that a ``tokenizer.json`` describes completely.

    Args:
        tokenizer: Tokenizer of the library. It is modified, so do not use it elsewhere.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # External files may set these, but ids must depend only on the caption, without padding.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
        self._tokenizer = tokenizer
        # The highest id, not the count: external files may have gaps.
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        self._vocab_size = 1 + max(ids, default=-1)

    @property
    def vocab_size(self) -> int:
        """Number of ids, without padding."""
        return self._vocab_size

    def encode(self, text: str, *, dropout: float = 0.0, seed: int = 0) -> list[int]:
        """Encodes a caption to ids, without special tokens."""
        self.check(text, dropout, seed)
        # The library's encode_batch is not faster for captions, and its threads do not survive the
        # fork of a data loader's workers.
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to a caption; padding is dropped."""
        text: str = self._tokenizer.decode(self.known_ids(ids), skip_special_tokens=False)
        return text

    def files(self) -> Mapping[str, str]:
        """Returns the only file, ``tokenizer.json``."""
        return {TOKENIZER_FILE: self._tokenizer.to_str()}

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads a ``tokenizer.json`` of any program."""
        return cls(cls._open(folder))

    @classmethod
    def _open(cls, folder: Path) -> Tokenizer:
        return open_tokenizer_json(folder / TOKENIZER_FILE)
