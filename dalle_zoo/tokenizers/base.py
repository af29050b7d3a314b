"""The interface of all text tokenizers, and their registry."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Self

from dalle_zoo.files import atomic_write, json_text, read_json
from dalle_zoo.paths import user_path
from dalle_zoo.registry import Registry
from dalle_zoo.tokenizers.words import WORDS_FILE
from dalle_zoo.values import as_integer, check_type

CONFIG_FILE = "tokenizer_config.json"
KIND_KEY = "text_tokenizer"


class TextTokenizer(ABC):
    """Maps a caption to ids and back.

    Ids are 0 .. ``vocab_size`` - 1. `CaptionEncoder` adds padding, with one id per position from
    ``vocab_size`` on, and `decode` drops it.

    Example:
        >>> from dalle_zoo.tokenizers import ByteTokenizer
        >>> tokenizer = ByteTokenizer()
        >>> padding = tokenizer.vocab_size  # of the first position
        >>> tokenizer.decode([*tokenizer.encode("a cat"), padding])
        'a cat'
    """

    kind: ClassVar[str]
    """Name in `TEXT_TOKENIZERS`, which is also saved with the tokenizer."""
    supports_dropout: ClassVar[bool] = False
    """Whether `encode` accepts a dropout above 0."""
    words: Mapping[str, int] | None = None
    """Words of the training captions with their counts, from `count_words`. Defaults to None: not known, or too many
    to be a closed vocabulary."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, without padding."""

    @abstractmethod
    def encode(self, text: str, *, dropout: float = 0.0, seed: int = 0) -> list[int]:
        """Encodes a caption to ids, without special tokens; an empty caption has no ids.

        Args:
            text: The caption.
            dropout: Probability of skipping a merge, 0 to 1; above 0 only if `supports_dropout`.
                Defaults to 0.
            seed: Seed of the dropout, at least 0: equal seeds give equal ids, on any machine.
                Defaults to 0.

        Raises:
            TypeError: The caption is not a string.
            ValueError: The caption is not valid Unicode, or dropout or seed is out of range.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to a caption.

        Args:
            ids: Ids, at least 0; those from ``vocab_size`` on are padding and are dropped.

        Returns:
            The caption; a character whose bytes are incomplete becomes U+FFFD.
        """

    @abstractmethod
    def files(self) -> Mapping[str, str]:
        """Names and contents of the files that `read` needs."""

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the kind and of all files."""
        return hashlib.sha256(json.dumps([self.kind, sorted(self.files().items())]).encode()).hexdigest()

    @classmethod
    @abstractmethod
    def read(cls, folder: Path) -> Self:
        """Reads the tokenizer from its `files`; `load` has checked the kind of the folder.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file cannot be read.
        """

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Loads a folder that `save` wrote, or a folder of another library, which records no kind.

        Raises:
            FileNotFoundError: The folder or a file is missing.
            ValueError: A file cannot be read or belongs to another kind.
        """
        folder = user_path(folder, "folder")
        kind = recorded_kind(folder)
        if kind not in (None, cls.kind):
            raise ValueError(
                f"{folder} has a tokenizer of kind {kind!r}, expected {cls.kind!r}: open it with load_text_tokenizer"
            )
        tokenizer, words = cls.read(folder), folder / WORDS_FILE
        tokenizer.words = read_json(words) if words.is_file() else None
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer into a folder, which is created if needed; each file is written atomically."""
        folder = user_path(folder, "folder")
        # The other two keys are for transformers' AutoTokenizer, which opens the folder too.
        config = {
            KIND_KEY: self.kind,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        # The kind is written first: an interrupted save must not leave files that load as another kind.
        contents = {CONFIG_FILE: json.dumps(config, indent=2) + "\n", **self.files()}
        if self.words is not None:
            contents[WORDS_FILE] = json_text(self.words)
        for name, content in contents.items():
            with atomic_write(folder / name) as aside:
                aside.write_text(content, encoding="utf-8")

    def check(self, text: str, dropout: float = 0.0, seed: int = 0) -> None:
        """Raises `TypeError` or `ValueError` for arguments that `encode` must reject."""
        if not isinstance(text, str):
            raise TypeError(f"a caption must be a str, got {type(text).__name__}: {text!r}")
        check_unicode(text)
        self.check_dropout(dropout)
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")

    def known_ids(self, ids: Iterable[int]) -> list[int]:
        """Returns the ids without padding; raises an error for values that are no ids."""
        check_type("ids", ids, Iterable, "a list of integers")
        indices = [as_integer("ids", i) for i in ids]
        if indices and min(indices) < 0:
            raise ValueError(f"ids must be at least 0, got {min(indices)}")
        return [i for i in indices if i < self.vocab_size]

    def check_dropout(self, dropout: float) -> None:
        """Raises `ValueError` for a dropout that is not a probability, or above 0 for a kind without dropout."""
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be in 0..1, got {dropout}")
        if dropout and not self.supports_dropout:
            raise ValueError(f"text tokenizer {self.kind!r} does not support dropout, got {dropout}: set it to 0")


def check_unicode(text: str) -> None:
    """Raises `ValueError` for a text with half of a surrogate pair, which no file or tokenizer can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"caption {text!r} is not valid Unicode ({error}): repair or drop it") from error


TEXT_TOKENIZERS: Registry[type[TextTokenizer]] = Registry(
    "text tokenizer", group="dalle_zoo.text_tokenizers", base=TextTokenizer
)


def recorded_kind(folder: str | Path) -> str | None:
    """Returns the kind that `TextTokenizer.save` recorded in a folder; None if there is no record."""
    folder = user_path(folder, "folder")
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist: expected one with tokenizer.json and {CONFIG_FILE}")
    path = folder / CONFIG_FILE
    if not path.exists():
        return None
    kind = read_json(path).get(KIND_KEY)
    return None if kind is None else str(kind)
