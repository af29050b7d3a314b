"""The text tokenizer of DALL-E mini and mega: captions are simplified to lower-case ASCII, then byte-level BPE.

The rules are those of the training code, <https://github.com/borisdayma/dalle-mini>, ``dalle_mini/model/text.py``.
Its large tables are replaced by simpler rules: letters beyond Latin are dropped, not transliterated; an emoji becomes
its Unicode name; broken encodings are not repaired, and the words of a hashtag are not separated.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dalle_zoo.tokenizers.base import TEXT_TOKENIZERS
from dalle_zoo.tokenizers.library import LibraryTokenizer

_PLAIN = str.maketrans(
    dict(zip("ØøÐðĐđŁłĦħŦŧı×÷", "OoDdDdLlHhTtix/", strict=True))
    | {"Æ": "AE", "æ": "ae", "Œ": "OE", "œ": "oe", "ß": "ss", "Þ": "Th", "þ": "th", "Ŋ": "NG", "ŋ": "ng"}
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u2032", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013", "-")
    | dict.fromkeys("\u2014\u2015", "--")
    | {"«": "<<", "»": ">>", "¡": "!", "¿": "?", "•": "*", "·": "*", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"}
    | {"°": "deg", "€": "EUR", "£": "PS", "¥": "Y=", "¢": "C/", "§": "SS", "µ": "u"}
)
"""Characters with an ASCII form that Unicode normalization does not give."""

# Placeholders for punctuation that is preserved: letters, so that they are parts of words, outside ASCII.
_DOT, _SLASH, _APOSTROPHE = "δ", "σ", "α"

_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\A\s*\[\d+\]|\[\d+\]\s*\Z", ""),  # references, as in encyclopedias
        (r"<[^<]+?>", " "),
        (r"http\S+", ""),
        *2 * [(r"(\d),(\d{3})", r"\1\2")],  # twice, as numbers overlap
        (r"(\w)\.(\w)", rf"\1{_DOT}\2"),
        (r"'(?=(?:[stdm]|ll|re|ve)\b)", _APOSTROPHE),
        (r"(\d)/(\d)", rf"\1{_SLASH}\2"),
        (r"(\w)-(\w)", r"\1 \2"),
        (r"([%&/$*])", r" \1 "),
        (r"#(?=\w)", ""),
        (r"[_#\\]", " "),
        (r"""['"`]""", ' " '),
        (r"[()\[\].,|:;?!=+~\-/{}]", ","),
        (_DOT, "."),
        (_APOSTROPHE, "'"),
        (_SLASH, "/"),
        (r"(\D)\1{3,}", r"\1"),
        (r'\s*"[\s"]*', ' " '),
        (r"\s*,[\s,]*", ", "),
        (r"\s+", " "),
    )
]


def plain_ascii(text: str) -> str:
    """Converts a caption to ASCII: without accents and curly quotes, emoji by name; other characters are dropped.

    Example:
        >>> plain_ascii("Ein Café – für “Zoë” 🍎")
        'Ein Cafe - fur "Zoe" :red apple:'
    """
    text = text.translate(_PLAIN)
    text = "".join(f":{unicodedata.name(c, '').lower()}:" if unicodedata.category(c) == "So" else c for c in text)
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def simplify(text: str) -> str:
    """Simplifies a caption as the training code does, except that there the result always starts with a space.

    The result is in lower case. Punctuation becomes commas, except dots and slashes within words and numbers,
    apostrophes of short forms, and quotation marks. Tags and addresses are removed.

    Example:
        >>> simplify("A well-known CAT's photo (2.5 m); see http://cat.org")
        "a well known cat's photo, 2.5 m, see"
    """
    text = plain_ascii(html.unescape(html.unescape(text))).lower()
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text.strip().removesuffix(",").removeprefix(",").strip()


@TEXT_TOKENIZERS.register("dalle_mini")
class DalleMiniTokenizer(LibraryTokenizer):
    """Byte-level BPE of simplified captions.

    A caption that is empty after simplification has no ids.

    Args:
        tokenizer: Byte-level BPE of the library that prepends a space, as `bart_bpe` builds it.

    Example:
        >>> vocabulary = {"Ġ": 0, "a": 1, "c": 2, "t": 3, "Ġc": 4, "at": 5, "Ġcat": 6}  # Ġ is a space
        >>> merges = [("Ġ", "c"), ("a", "t"), ("Ġc", "at")]
        >>> DalleMiniTokenizer(bart_bpe(vocabulary, merges, simplified=True)).encode("A CAT!")
        [0, 1, 6]
    """

    kind = "dalle_mini"

    def encode(self, text: str, *, dropout: float = 0.0, seed: int = 0) -> list[int]:
        """Returns the ids of a simplified caption, without special tokens."""
        self.check(text, dropout, seed)
        return super().encode(simplify(text))


def bart_bpe(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], *, simplified: bool) -> Tokenizer:
    """Builds the library's tokenizer for a vocabulary in BART's format.

    Args:
        vocabulary: Ids of all tokens, including special tokens.
        merges: Pairs, in order of priority.
        simplified: Whether captions are simplified before. Then a space is prepended, and captions cannot contain
            special tokens. Otherwise no space is prepended, and captions may contain special tokens.

    Raises:
        ValueError: A part or the result of a merge is not in the vocabulary.
    """
    try:
        tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges)))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"vocabulary and merges do not belong together: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=simplified)
    tokenizer.decoder = decoders.ByteLevel()
    if simplified:
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        return tokenizer
    special = [token for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>") if token in vocabulary]
    # As in BART, the mask takes the space before it.
    tokenizer.add_special_tokens([AddedToken(t, lstrip=t == "<mask>", special=True) for t in special])
    return tokenizer
