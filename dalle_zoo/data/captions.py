"""Captions of an image, from the files or archive members next to it."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from dalle_zoo.plain_data import MAX_BYTES, PlainDataError, json_value

MAX_CAPTION_BYTES = MAX_BYTES
"""Largest caption file that is read, in bytes."""

NO_CAPTION = (
    "no caption (no .txt and no valid .json of the same name has one; in a shard, it must be adjacent to the image, "
    "as `tar --sort=name` orders members)"
)
INVALID_CAPTION = "a caption is not valid Unicode (stored in another encoding than UTF-8, or half of a surrogate pair)"


def read_captions(json_text: bytes | None, plain_text: bytes | None) -> tuple[str, ...]:
    r"""Returns the captions of an image from its .json file, or else from its .txt file.

    The .json file has a list ``captions`` or a string ``caption``; every line of the .txt file is a caption. A file
    that cannot be read counts as missing. The captions of a file in another encoding than UTF-8 are returned, but are
    not valid: see `valid_captions`.

    Example:
        >>> read_captions(b'{"captions": ["a cat", "one cat"]}', b"a cat")
        ('a cat', 'one cat')
        >>> read_captions(None, b"a cat\n\none cat\n")
        ('a cat', 'one cat')
    """
    return _captions_of_json(json_text) or _captions_of_lines(plain_text)


def valid_captions(captions: Iterable[str]) -> tuple[tuple[str, ...], str]:
    r"""Leaves out the captions that are not valid Unicode text: tokenizers and files cannot hold them.

    Returns:
        The valid captions, and the reason for leaving out others: `INVALID_CAPTION`, or ``""`` if all are valid.

    Example:
        >>> valid_captions(["a cat", "a dog \ud83d"])[0]
        ('a cat',)
    """
    captions = tuple(captions)
    valid = tuple(caption for caption in captions if _is_valid(caption))
    return valid, "" if len(valid) == len(captions) else INVALID_CAPTION


def _is_valid(text: str) -> bool:
    try:
        # UTF-16 read as UTF-8 is full of NUL characters.
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _captions_of_json(text: bytes | None) -> tuple[str, ...]:
    try:
        # Files of Python may have NaN among the captions, and those of Windows a byte order mark.
        record = json_value((text or b"{}").removeprefix(codecs.BOM_UTF8), finite=False)
    except PlainDataError:
        return ()
    if not isinstance(record, dict):
        return ()
    several = record.get("captions")
    for captions in (several if isinstance(several, list) else [], [record.get("caption")]):
        found = tuple(c.strip() for c in captions if isinstance(c, str) and c.strip())
        if found:
            return found
    return ()


def _captions_of_lines(text: bytes | None) -> tuple[str, ...]:
    # Bytes that are not UTF-8 become lone surrogates, so that their captions are not valid instead of missing.
    lines = (text or b"").decode("utf-8-sig", "surrogateescape").splitlines()
    return tuple(line.strip() for line in lines if line.strip())
