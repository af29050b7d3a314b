"""CLIP's text tokenizer: cleaned lower-case captions, and a byte-level BPE that marks the last piece of a word.

OpenAI published it with CLIP; it is the default of DALLE-pytorch. The cleaning rules are those of
<https://github.com/openai/CLIP>, ``clip/simple_tokenizer.py``, but text that was decoded with the wrong encoding is
not repaired; the original uses the package ftfy for that.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from dalle_zoo.tokenizers.base import TEXT_TOKENIZERS
from dalle_zoo.tokenizers.library import LibraryTokenizer

END_OF_WORD = "</w>"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
NUM_MERGES = 49152 - 256 - 2
"""Number of merges that CLIP uses; the published file has more."""
HEADER = '"bpe_simple_vocab_16e6.txt#version: 0.2'
"""First line of the published file."""

_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_COMPATIBLE = (
    0x132,
    0x133,
    *range(0x1C4, 0x1CD),
    *range(0x1F1, 0x1F4),
    *range(0xFB00, 0xFB07),
    *range(0xFF01, 0xFFF0),
)
_CONTROL = (*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD))
_PLAIN = str.maketrans(
    {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in _COMPATIBLE}
    | {"\u0149": "'n", "\ufb05": "\u017ft", "\u3000": " "}
    | dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
    | {chr(code): None for code in _CONTROL}
)
"""Characters that ftfy replaces or drops: ligatures, curly quotes, full-width letters, control characters."""


def clean(text: str) -> str:
    r"""Cleans a caption as CLIP does: plain punctuation, HTML entities resolved, single spaces, lower case.

    Example:
        >>> clean("  “Tom &amp;amp; Jerry”,\tthe ﬁlm ")
        '"tom & jerry", the film'
    """
    if "<" not in text:  # ftfy treats text with "<" as HTML
        text = html.unescape(text)
    text = unicodedata.normalize("NFC", text.translate(_PLAIN))
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip().lower()


@TEXT_TOKENIZERS.register("clip")
class CLIPTokenizer(LibraryTokenizer):
    """CLIP's byte-level BPE of cleaned captions.

    Special tokens are encoded only if a caption contains their text.

    Args:
        tokenizer: Tokenizer of the library, as `clip_bpe` builds it.

    Example:
        >>> tokenizer = CLIPTokenizer(clip_bpe([("a", "t</w>"), ("c", "at</w>")]))
        >>> tokenizer.decode(tokenizer.encode("A  CAT")), len(tokenizer.encode("A  CAT"))
        ('a cat', 2)
    """

    kind = "clip"

    def encode(self, text: str, *, dropout: float = 0.0, seed: int = 0) -> list[int]:
        """Returns the ids of a cleaned caption, without special tokens."""
        self.check(text, dropout, seed)
        return super().encode(clean(text))


def clip_bpe(merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """Builds the library's tokenizer for a list of merges.

    The ids are those of bytes, of bytes that end a word, of merged pieces, and of the special tokens: 49,408 with
    CLIP's own list.

    Args:
        merges: Pairs of pieces, in order of priority.

    Raises:
        ValueError: Two pairs form the same piece, or a pair contains an unknown piece.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())  # CLIP's order: printable Latin-1, then from U+0100 on
    pieces = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *("".join(merge) for merge in merges), *SPECIAL]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise ValueError("two merges form the same piece")
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), end_of_word_suffix=END_OF_WORD))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"these merges do not form a vocabulary: {error}") from error
    words = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(END_OF_WORD, " "), decoders.Replace(Regex(r" \z"), "")]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer
