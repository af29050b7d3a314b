"""Reads vocabularies of YouTokenToMe, which are text files, as native tokenizers with the same ids.

```
2 1                 number of characters, number of merges
9601 4              character (code point) and its id; one of them marks the start of a word
97 5
4 5 6               merge: left id, right id, id of the result; in order of priority
1 0 2 3             ids of unknown, padding, start and end of a text
```
Reference: https://github.com/VKCOM/YouTokenToMe.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.tokenizers import HFTokenizer

MAX_BYTES = 16 * 2**20
"""Size limit of a file; 16,384 tokens take 300 kB."""
MAX_TOKEN = 1000
"""Limit of a token in characters; merges of merges can reach any length."""
SPECIAL = {1: "<UNK>", 0: "<PAD>", 2: "<BOS>", 3: "<EOS>"}
"""Default special tokens of YouTokenToMe by id, in the order of the file."""
START_OF_WORD = "▁"
SPACES = r"[\t-\r ▁]"
"""Characters that separate words: ASCII spaces, and the mark itself."""

_BEGIN = re.compile(rb"(?:\d{1,9} \d{1,9}\n){4}")
_FORM = re.compile(rb"\d{1,9} \d{1,9}\n(?:\d{1,9} \d{1,9}(?: \d{1,9})?\n)+\d{1,9}(?: \d{1,9}){3}\s*")


def is_vocabulary(path: Path) -> bool:
    """Returns whether a file starts like a vocabulary, even if it is truncated: that is an error, not another file."""
    with path.open("rb") as file:
        return _BEGIN.match(file.read(100)) is not None


def read_vocabulary(path: Path) -> HFTokenizer:
    """Reads a vocabulary as a tokenizer that adds neither start nor end token.

    Raises:
        WeightFileError: The file is damaged, has unusual special tokens, or two tokens with the same text.
    """
    if path.stat().st_size > MAX_BYTES or _FORM.fullmatch(path.read_bytes()) is None:
        raise WeightFileError(f"{path} starts like a vocabulary of YouTokenToMe, but is truncated or damaged")
    rows = [[int(number) for number in line.split()] for line in path.read_text("ascii").strip().splitlines()]
    num_characters, num_merges = rows[0]
    characters, merges, special = rows[1 : 1 + num_characters], rows[1 + num_characters : -1], rows[-1]
    if len(merges) != num_merges or {len(row) for row in characters} != {2} or {len(row) for row in merges} - {3}:
        raise WeightFileError(f"{path} does not hold its {num_characters} characters and {num_merges} merges")
    if special != list(SPECIAL):
        raise WeightFileError(f"{path} has the special tokens {special}, expected {list(SPECIAL)}")
    texts, pairs = dict(SPECIAL), []
    for character, token in characters:
        if character > sys.maxunicode or 0xD800 <= character < 0xE000:
            raise WeightFileError(f"{path} has the character {character}, which is not in Unicode")
        texts[token] = chr(character)
    for left, right, joined in merges:
        if left not in texts or right not in texts:
            raise WeightFileError(f"{path} merges {left} and {right}, one of which is not defined before")
        pairs.append((texts[left], texts[right]))
        texts[joined] = texts[left] + texts[right]
        if len(texts[joined]) > MAX_TOKEN:
            raise WeightFileError(f"{path} has a token of more than {MAX_TOKEN} characters")
    ids = {text: token for token, text in texts.items()}
    size = len(SPECIAL) + num_characters + num_merges
    if sorted(texts) != list(range(size)) or len(ids) != size or START_OF_WORD not in ids:
        raise WeightFileError(
            f"{path} must give {size} different texts, including {START_OF_WORD}, the ids 0 to {size - 1}"
        )
    return HFTokenizer(_tokenizer(ids, pairs))


def _tokenizer(ids: dict[str, int], pairs: list[tuple[str, str]]) -> Tokenizer:
    """Builds the library's tokenizer: words start with the mark; consecutive unknown characters are one token."""
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs, unk_token=SPECIAL[1], fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(rf"\A{SPACES}+|{SPACES}+\z"), ""),
            normalizers.Replace(Regex(rf"{SPACES}+"), START_OF_WORD),
            normalizers.Prepend(START_OF_WORD),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(START_OF_WORD, "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(START_OF_WORD, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
