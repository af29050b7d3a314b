"""Loads any Hugging Face tokenizer from a local folder."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from dalle_zoo.tokenizers.base import CONFIG_FILE, TEXT_TOKENIZERS
from dalle_zoo.tokenizers.library import TOKENIZER_FILE, LibraryTokenizer, open_tokenizer_json


@TEXT_TOKENIZERS.register("hf")
class HFTokenizer(LibraryTokenizer):
    """A Hugging Face tokenizer that adds no special tokens, truncation or padding.

    Special tokens stay in the vocabulary and are encoded only if a caption contains their text; none
    is used as padding. `save` writes ``tokenizer.json``, whatever format was loaded.

    Args:
        tokenizer: Tokenizer of the library.

    Example:
        >>> from tokenizers import models, pre_tokenizers
        >>> words = Tokenizer(models.WordLevel({"a": 0, "cat": 1, "?": 2}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> HFTokenizer(words).encode("a cat sat")
        [0, 1, 2]
    """

    kind = "hf"

    @classmethod
    def _open(cls, folder: Path) -> Tokenizer:
        if (folder / TOKENIZER_FILE).exists():
            return open_tokenizer_json(folder / TOKENIZER_FILE)
        configs = (CONFIG_FILE, "config.json")
        if not any((folder / name).is_file() for name in configs):
            raise FileNotFoundError(
                f"no tokenizer in {folder}: expected {TOKENIZER_FILE}, or the vocabulary files of "
                f"a transformers tokenizer next to a {' or '.join(configs)}"
            )
        return _convert(folder)


def _convert(folder: Path) -> Tokenizer:
    """Converts vocabulary files of transformers to a tokenizer of the library."""
    from transformers import AutoTokenizer  # takes seconds to import and is needed only here

    try:
        opened = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types
        raise ValueError(f"transformers cannot open the tokenizer in {folder}: {error}") from error
    tokenizer = getattr(opened, "backend_tokenizer", None)
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"{type(opened).__name__} in {folder} has no fast version: convert it to {TOKENIZER_FILE}")
    return tokenizer
