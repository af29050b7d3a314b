"""UTF-8 bytes as ids: no training, no unknown tokens, lossless."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dalle_zoo.tokenizers.base import TEXT_TOKENIZERS
from dalle_zoo.tokenizers.library import LibraryTokenizer


def _byte_symbols() -> dict[str, int]:
    """Returns the byte of each printable symbol in the library's byte level.

    A byte that is a printable Latin-1 character is its own symbol; the others have, in order, the
    characters from U+0100 on.
    """
    symbols = set(pre_tokenizers.ByteLevel.alphabet())
    shifted = iter(sorted(symbol for symbol in symbols if ord(symbol) > 255))
    return {chr(byte) if chr(byte) in symbols else next(shifted): byte for byte in range(256)}


def _byte_tokenizer() -> Tokenizer:
    """Builds a BPE over the 256 byte symbols without merges, whose ids are the bytes."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_symbols(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@TEXT_TOKENIZERS.register("byte")
class ByteTokenizer(LibraryTokenizer):
    """The ids are the UTF-8 bytes of the caption, with case and spaces unchanged.

    Args:
        tokenizer: A library tokenizer with these 256 ids. Defaults to a new one.

    Example:
        >>> ByteTokenizer().encode("Ä b")
        [195, 132, 32, 98]
    """

    kind = "byte"

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(tokenizer or _byte_tokenizer())
        if self._tokenizer.get_vocab() != _byte_symbols():
            raise ValueError("the tokenizer's ids are not the 256 bytes: open it with HFTokenizer")
