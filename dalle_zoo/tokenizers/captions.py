"""Encodes batches of captions to ids of fixed length, with one padding token per position."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from dalle_zoo.registry import suggest
from dalle_zoo.tokenizers.base import TextTokenizer
from dalle_zoo.values import as_integer, check_type

log = logging.getLogger(__name__)

Overlong = Literal["truncate", "error"]


class CaptionEncoder:
    """Encodes captions to a fixed length.

    A position p after the end of a caption holds id ``vocab_size + p``: one learned padding token
    per position (section 2.2 of the paper), outside the ids of the tokenizer. An empty caption is all
    padding.

    Args:
        tokenizer: Any text tokenizer.
        length: Text positions T; 256 in the paper.
        overlong: What to do with a caption of more than `length` tokens: ``truncate`` drops the end,
            counts the caption in `num_truncated`, and warns at the first one and at every power of
            ten; ``error`` raises `ValueError`. Defaults to ``truncate``.
        dropout: BPE dropout; the paper trains with 0.1. Defaults to 0, for generation.

    Example:
        >>> from dalle_zoo.tokenizers import ByteTokenizer
        >>> CaptionEncoder(ByteTokenizer(), length=4)(["ab", ""])
        tensor([[ 97,  98, 258, 259],
                [256, 257, 258, 259]])
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        length: int,
        overlong: Overlong = "truncate",
        dropout: float = 0.0,
    ) -> None:
        check_type("tokenizer", tokenizer, TextTokenizer, "a TextTokenizer")
        length = as_integer("length", length, least=1)
        if overlong not in get_args(Overlong):
            raise ValueError(suggest("overlong", overlong, get_args(Overlong)))
        tokenizer.check_dropout(dropout)
        self.tokenizer, self.length = tokenizer, length
        self.overlong, self.dropout = overlong, dropout
        self.num_truncated = 0
        """Number of captions truncated so far."""

    def __call__(self, texts: Sequence[str], seeds: Sequence[int] | None = None) -> Tensor:
        """Encodes a batch.

        Args:
            texts: B captions.
            seeds: Dropout seed of each caption; required if ``dropout`` is above 0, else unused. If it
                depends only on sample and epoch, a resumed run is identical. Defaults to None.

        Returns:
            Ids, int64 (B, T).

        Raises:
            TypeError: `texts` is a single string, or a caption is not a string.
            ValueError: A caption is too long and `overlong` is ``error``, or seeds are missing.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts must be a sequence, got a single caption: pass [{_short(texts)}]")
        check_type("texts", texts, Sequence, "a sequence of captions")
        if seeds is None:
            if self.dropout:
                raise ValueError(f"dropout {self.dropout} needs seeds, one per caption, got none")
            seeds = [0] * len(texts)
        if len(seeds) != len(texts):
            raise ValueError(f"seeds must be one per caption, got {len(seeds)} for {len(texts)}")
        rows = [
            self.tokenizer.encode(text, dropout=self.dropout, seed=seed)
            for text, seed in zip(texts, seeds, strict=True)
        ]
        self._handle_overlong(texts, rows)
        pads = [self.tokenizer.vocab_size + position for position in range(self.length)]
        padded = [ids[: self.length] + pads[len(ids) :] for ids in rows]
        return torch.tensor(padded, dtype=torch.int64).reshape(len(padded), self.length)

    def _handle_overlong(self, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> None:
        overlong = [number for number, ids in enumerate(rows) if len(ids) > self.length]
        if not overlong:
            return
        text, tokens = texts[overlong[0]], len(rows[overlong[0]])
        if self.overlong == "error":
            raise ValueError(
                f"caption {_short(text)} has {tokens} tokens, the limit is {self.length}: "
                'shorten it, or truncate such captions with overlong="truncate"'
            )
        before, self.num_truncated = self.num_truncated, self.num_truncated + len(overlong)
        if before == 0 or len(str(before)) < len(str(self.num_truncated)):
            log.warning(
                "captions truncated to %d tokens: %d so far, %d in this batch, the first %s with %d",
                *(self.length, self.num_truncated, len(overlong), _short(text), tokens),
            )


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
