"""The words of training captions, and messages for prompts with other words.

A model knows the words of its training captions and no others. A tokenizer that is trained on those captions records
them in ``words.json`` next to its own files, and every copy of the tokenizer keeps them.
"""

from __future__ import annotations

import difflib
import logging
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

log = logging.getLogger(__name__)

WORDS_FILE = "words.json"
"""Word to the number of training captions that have it, most frequent first."""
MOST_WORDS = 20_000
"""With more different words than this a vocabulary is not closed, and none is recorded."""
PUNCTUATION = string.punctuation + "\u2018\u2019\u201c\u201d\u2026"
"""What may be around a word, typographic quotation marks and the ellipsis too."""
_RARE = 1 / 5000
"""A word in at most this share of the captions is rare; the most frequent word, such as "a", counts as all of them."""
_NEAR = 0.8
"""Similarity from which a known word is suggested instead of an unknown one: one letter of five."""


def split_words(text: str) -> list[str]:
    """Words of a caption in lower case, without the punctuation around them.

    Example:
        >>> split_words("A 3D emoji of a cat, on blue!")
        ['a', '3d', 'emoji', 'of', 'a', 'cat', 'on', 'blue']
    """
    words = (word.strip(PUNCTUATION) for word in text.casefold().split())
    return [word for word in words if word]


def count_words(captions: Iterable[str]) -> dict[str, int] | None:
    """Counts in how many captions each word is; None if there are more than `MOST_WORDS` words."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(set(split_words(caption)))
        if len(counts) > MOST_WORDS:
            return None
    return most_frequent_first(counts)


def most_frequent_first(counts: Mapping[str, int]) -> dict[str, int]:
    """Sorts counts of words; those of equal counts by the alphabet."""
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def note_unknown(prompts: Sequence[str], words: Mapping[str, int] | None) -> None:
    """Logs one line per prompt that is empty or has words that the model never or hardly saw.

    Args:
        prompts: Prompts of the images.
        words: Words of the training captions; None if they are unknown, as for most models.
    """
    for prompt in dict.fromkeys(prompts):
        if note := unknown_note(prompt, words):
            log.warning("%s", note)


def unknown_note(prompt: str, words: Mapping[str, int] | None) -> str:
    """Returns a message about unknown and rare words of a prompt; empty if there are none.

    Example:
        >>> unknown_note("a yelow cat", {"a": 9, "cat": 2, "yellow": 1})
        "prompt 'a yelow cat': the model never saw the word 'yelow' (did you mean 'yellow'?)"
        >>> unknown_note("a king", {"a": 9000, "king": 1})
        "prompt 'a king': the model hardly saw the word 'king'"
    """
    asked = split_words(prompt)
    if not asked:
        return f"prompt {prompt!r} has no words: the images show anything that the model knows"
    if words is None:
        return ""
    unknown = [word for word in dict.fromkeys(asked) if word not in words]
    rare = [word for word in dict.fromkeys(asked) if 0 < words.get(word, 0) <= _RARE * max(words.values())]
    notes = []
    if unknown:
        notes.append("never" + _listed([f"{word!r}{_suggestion(word, words)}" for word in unknown]))
    if rare:
        notes.append("hardly" + _listed([repr(word) for word in rare]))
    if not notes:
        return ""
    note = f"prompt {prompt!r}: the model {', and '.join(notes)}"
    if len(unknown) < len(set(asked)):
        return note
    return f"{note}, so it knows none of the prompt; among its words are {_examples(words)}"


def _listed(named: list[str]) -> str:
    return f" saw the word{'s' * (len(named) > 1)} {', '.join(named)}"


def _suggestion(word: str, words: Mapping[str, int]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=_NEAR)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _examples(words: Mapping[str, int]) -> str:
    """Some frequent words that are not as short as "a" and "of"."""
    return ", ".join(repr(word) for word in [word for word in words if len(word) > 3][:3])
