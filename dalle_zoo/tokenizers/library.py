"""Text tokenizers that the `tokenizers` library runs: all they do is in ``tokenizer.json``."""

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
        ValueError: The library can't read it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: expected a file of the tokenizers library")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is no file of the tokenizers library ({error}): write it again") from error


class LibraryTokenizer(TextTokenizer):
    """Base of the tokenizers whose every step is in a ``tokenizer.json``.

    Args:
        tokenizer: The library's object; this one becomes its owner.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Files of others may hold these; our ids depend on the caption alone, and pads are ours.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
        self._tokenizer = tokenizer
        # The highest id, not the count: files of others may leave gaps.
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        self._vocab_size = 1 + max(ids, default=-1)

    @property
    def vocab_size(self) -> int:
        """Number of ids, paddings not counted."""
        return self._vocab_size

    def encode(self, text: str, *, dropout: float = 0.0, seed: int = 0) -> list[int]:
        """Ids of a caption, without special tokens."""
        self.check(text, dropout, seed)
        # Nobody needs the library's encode_batch: on captions it is no faster, and its threads do
        # not survive the fork of a data loader's workers.
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Caption of ids; paddings are dropped."""
        text: str = self._tokenizer.decode(self.known_ids(ids), skip_special_tokens=False)
        return text

    def files(self) -> Mapping[str, str]:
        """The library's file, alone."""
        return {TOKENIZER_FILE: self._tokenizer.to_str()}

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads a ``tokenizer.json``, whichever program wrote it."""
        return cls(cls._open(folder))

    @classmethod
    def _open(cls, folder: Path) -> Tokenizer:
        return open_tokenizer_json(folder / TOKENIZER_FILE)
