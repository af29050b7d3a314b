"""Training of words only: embeddings of text tokens, of all or of those of chosen words; nothing else changes.

A new word needs no new token: a rare word, or several tokens that spell it, get the meaning. After training with
chosen words, a prompt without their tokens generates the same images as before. Compare Textual Inversion (Gal et al.,
2022), arXiv 2208.01618, which trains a single embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dalle_zoo.models.image_prior import ImagePrior
from dalle_zoo.tokenizers import CaptionEncoder

log = logging.getLogger(__name__)


def freeze_all_but_words(net: ImagePrior) -> list[nn.Parameter]:
    """Freezes a prior, all but the embeddings of text tokens, and returns these.

    Raises:
        ValueError: The prior has no embeddings of text tokens alone.
    """
    words = net.word_embeddings()
    if not words:
        raise ValueError("model.tune words is not possible: the prior shares the embeddings of text with its head")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in words)
    return [parameter for name, parameter in net.named_parameters() if name in words]


def limit_to_words(
    embeddings: Iterable[nn.Parameter], words: Sequence[str], encoder: CaptionEncoder
) -> list[RemovableHandle]:
    """Lets only the embeddings of the tokens of some words have gradients.

    Args:
        embeddings: Embeddings of text tokens, a row per id.
        words: The words.
        encoder: The network's encoder of captions, without dropout.

    Returns:
        Handles that remove the limit.
    """
    tokens = tokens_of(words, encoder)
    spelled = ", ".join(repr(encoder.tokenizer.decode([token]).strip()) for token in tokens)
    rank_zero_only(log.warning)("%d text tokens are trained: %s", len(tokens), spelled)

    rows = torch.tensor(tokens)

    def limit(gradient: Tensor) -> Tensor:
        nonlocal rows
        rows = rows.to(gradient.device)  # copied in the first step only
        return torch.zeros_like(gradient).index_copy_(0, rows, gradient.index_select(0, rows))

    return [embedding.register_hook(limit) for embedding in embeddings]  # type: ignore[no-untyped-call]


def tokens_of(words: Sequence[str], encoder: CaptionEncoder) -> list[int]:
    """Returns the ids of the tokens that words have at the beginning of a caption and within it.

    Raises:
        ValueError: A word has no token.
    """
    found: set[int] = set()
    for word in words:
        own: set[int] = set()
        for before in ("", "a "):
            with_word, without = encoder([before + word, before.strip()]).tolist()
            own |= set(with_word) - set(without)  # without paddings and special tokens
        if not own:
            raise ValueError(f"model.words: {word!r} has no tokens in the text tokenizer: choose another word")
        found |= own
    return sorted(found)
