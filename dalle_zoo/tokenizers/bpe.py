"""Byte-pair encoding, trained on captions: the paper's text tokenizer."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from operator import index
from random import Random
from typing import Self

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dalle_zoo.tokenizers.base import TEXT_TOKENIZERS, check_unicode
from dalle_zoo.tokenizers.bpe_dropout import DropoutMerger
from dalle_zoo.tokenizers.library import LibraryTokenizer

log = logging.getLogger(__name__)

MIN_PAIR_COUNT = 2
"""Minimum number of occurrences of a pair that is merged."""

_MOST_REPEATED = 1000  # of a piece in one text

# Settings of the library's BPE model that `DropoutMerger` does not implement, with the values they must have.
_PLAIN_MODEL = {
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": False,
    "ignore_merges": False,
}


@TEXT_TOKENIZERS.register("bpe")
class BPETokenizer(LibraryTokenizer):
    """Byte-level BPE over lower-cased captions, with seeded dropout.

    Captions are lower-cased, composed (NFC), and their white space is collapsed. A space is
    prepended, so that a word has the same tokens at the start of a caption and inside it. All 256
    bytes are in the vocabulary, so there are no unknown tokens.

    Reference: Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), section 2.2 and footnote 5
    (10 % dropout while training); BPE-Dropout (Provilkov et al., 2020).

    Args:
        tokenizer: A byte-level BPE of the library without added tokens, such as `train` builds.

    Example:
        >>> tokenizer = BPETokenizer.train(["a red apple", "a red car"], vocab_size=260)
        >>> tokenizer.decode(tokenizer.encode("A red  apple"))
        'a red apple'
    """

    kind = "bpe"
    supports_dropout = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        content = json.loads(tokenizer.to_str())
        model = content["model"]
        unsupported = [name for name, value in _PLAIN_MODEL.items() if model.get(name, value) != value]
        complete = set(pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys()
        byte_level = complete and tokenizer.pre_tokenizer is not None
        if model["type"] != "BPE" or unsupported or content["added_tokens"] or not byte_level:
            raise ValueError(
                f"kind 'bpe' expects a byte-level BPE without added tokens, got a {model['type']} with "
                f"{len(content['added_tokens'])} added tokens, byte level: {byte_level}, "
                f"unsupported settings: {', '.join(unsupported) or 'none'}: open it with HFTokenizer"
            )
        self._merger = DropoutMerger(model["vocab"], model["merges"])

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 16384) -> Self:
        """Trains a vocabulary; it does not depend on the order of the captions.

        Args:
            captions: Training captions; iterated over once.
            vocab_size: Number of ids, at least 256. Captions with too few repeated pairs give fewer
                ids, with a warning. Defaults to the paper's 16,384.

        Returns:
            The tokenizer.

        Raises:
            TypeError: A caption is not a string.
            ValueError: There are no captions, one is not valid Unicode, or ``vocab_size`` is too small.

        Example:
            >>> BPETokenizer.train(["a red apple", "a red car"], vocab_size=260).vocab_size
            260
        """
        _check_size(vocab_size)
        return cls.train_counts(count_pieces(captions), vocab_size)

    @classmethod
    def train_counts(cls, counts: Mapping[str, int], vocab_size: int = 16384) -> Self:
        """Trains a vocabulary on the counts of `count_pieces`; the result is that of `train` on the same captions.

        Args:
            counts: Occurrences of each piece; those of several sets of captions are added.
            vocab_size: As in `train`. Defaults to 16,384.
        """
        _check_size(vocab_size)
        tokenizer = Tokenizer(models.BPE())
        # Pieces are in the byte-level alphabet, which has no white space: they need not be split or mapped again.
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=MIN_PAIR_COUNT,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_repeated(counts), trainer)
        tokenizer.normalizer, tokenizer.pre_tokenizer = _normalizer(), _pre_tokenizer()
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        reached = tokenizer.get_vocab_size()
        if reached < vocab_size:
            log.warning("the captions give a vocabulary of only %d ids, not %d", reached, vocab_size)
        return cls(tokenizer)

    def encode(self, text: str, *, dropout: float = 0.0, seed: int = 0) -> list[int]:
        """Returns the ids of a caption, computed by the library, or by `DropoutMerger` if there is dropout."""
        if not dropout:
            return super().encode(text, seed=seed)
        self.check(text, dropout, seed)
        return self._merge(text, dropout, Random(index(seed)))

    def _merge(self, text: str, dropout: float, random: Random) -> list[int]:
        """Returns the library's encoding with merges by `DropoutMerger`."""
        normalizer = self._tokenizer.normalizer
        normal = text if normalizer is None else normalizer.normalize_str(text)
        words = self._tokenizer.pre_tokenizer.pre_tokenize_str(normal)
        return [i for word, _ in words for i in self._merger(word, dropout, random)]


def count_pieces(captions: Iterable[str]) -> Counter[str]:
    """Counts the pieces of captions, such as " cat", "'s" and "!", within which bytes are merged.

    Args:
        captions: Captions; iterated over once.

    Returns:
        Occurrences of each piece, in the byte-level alphabet.

    Raises:
        TypeError: A caption is not a string.
        ValueError: A caption is not valid Unicode.
    """
    normalizer, pre_tokenizer = _normalizer(), _pre_tokenizer()
    counts: Counter[str] = Counter()
    for caption in _checked(captions):
        counts.update(piece for piece, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(caption)))
    return counts


def _normalizer() -> normalizers.Normalizer:
    # Lower case first: a lower-case letter may have a composed form that its capital lacks.
    return normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=True)


def _check_size(vocab_size: int) -> None:
    if vocab_size < 256:
        raise ValueError(f"vocab_size must be at least 256, one id per byte, got {vocab_size}")


def _repeated(counts: Mapping[str, int]) -> Iterator[str]:
    """Yields each piece as often as it was counted: the library counts by itself."""
    if not counts:
        raise ValueError("captions is empty: pass at least one caption to train a vocabulary")
    for piece, count in counts.items():
        for start in range(0, count, _MOST_REPEATED):
            yield " ".join([piece] * min(_MOST_REPEATED, count - start))


def _checked(captions: Iterable[str]) -> Iterator[str]:
    if isinstance(captions, str):
        raise TypeError("captions must be an iterable of strings, got a string: put it into a list")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"caption {number} must be a str, got {type(caption).__name__}: {caption!r}")
        check_unicode(caption)
        yield caption
