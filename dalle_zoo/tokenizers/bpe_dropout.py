"""BPE dropout with a seed.

The library's own dropout samples from a generator that cannot be seeded, so a resumed run would
differ. Its distribution differs as well: it samples a dropped merge again whenever a stale entry of
the queue turns up, so words stay complete more often than in the published algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from random import Random


class DropoutMerger:
    """Merges the symbols of a word and drops possible merges at random.

    Each step drops every possible merge with probability p and applies the first of the remaining
    ones (by rank, then by position); the word is finished when a step drops them all. With p = 0
    this is plain BPE. A step stops sampling at the first merge it keeps, which is equivalent.

    Reference: BPE-Dropout: Simple and Effective Subword Regularization (Provilkov et al., 2020),
    algorithm 1.

    Args:
        vocab: Id of every symbol.
        merges: Pairs of symbols, in order of priority.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[Sequence[str]]) -> None:
        self._vocab = dict(vocab)
        self._merges = {
            (vocab[left], vocab[right]): (rank, vocab[left + right]) for rank, (left, right) in enumerate(merges)
        }

    def __call__(self, word: str, dropout: float, random: Random) -> list[int]:
        """Returns the ids of a word in the byte-level alphabet.

        Args:
            word: The word; all its characters must be in the vocabulary.
            dropout: Probability p of dropping a merge.
            random: Generator of the samples.

        Returns:
            The ids, whose concatenated symbols are the word.
        """
        # A doubly linked list; the final -1 is also the predecessor of the first symbol.
        symbols = [self._vocab[character] for character in word] + [-1]
        following = list(range(1, len(symbols) + 1))
        preceding = list(range(-1, len(symbols) - 1))
        merges, sample = self._merges, random.random

        # Possible merges: (rank, position, merged id). A merge makes its neighbors stale.
        candidates = [
            (merge[0], at, merge[1])
            for at, pair in enumerate(pairwise(symbols))
            if (merge := merges.get(pair)) is not None
        ]
        heapify(candidates)
        dropped = []
        while candidates:
            candidate = heappop(candidates)
            rank, at, merged = candidate
            right = following[at]
            if merges.get((symbols[at], symbols[right])) != (rank, merged):
                continue
            if dropout and sample() < dropout:
                dropped.append(candidate)
                continue
            symbols[at], symbols[right] = merged, -1
            after = following[at] = following[right]
            preceding[after] = at
            before = preceding[at]
            for left, next_to_it in ((before, at), (at, after)):
                merge = merges.get((symbols[left], symbols[next_to_it]))
                if merge is not None:
                    heappush(candidates, (merge[0], left, merge[1]))
            # The next step samples again for the merges that this one dropped.
            for candidate in dropped:
                heappush(candidates, candidate)
            dropped.clear()
        return [symbol for symbol in symbols if symbol >= 0]
