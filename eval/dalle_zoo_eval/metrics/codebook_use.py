"""Codebook use: share of the codes that a set of images uses, and their perplexity."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_zoo_eval.metrics.base import METRICS


@METRICS.register(
    "codebook_use",
    extractor="image_tokenizer",
    label="",
    format=".1f",
    section="Reconstruction",
    parts={"used": "codes used, %", "perplexity": "perplexity of the codes"},
    images=("real",),
)
def codebook_use(codes: Tensor, codebook_size: Tensor | int) -> dict[str, float]:
    """Returns the share of codes that occur, and the perplexity of their distribution.

    Args:
        codes: Codes of all images, integers of any shape.
        codebook_size: Size K of the codebook; may be repeated for every image.

    Returns:
        ``used``, the share of codes that occur, and ``perplexity``, exp of the entropy of their frequencies, in 1..K.

    Example:
        >>> codebook_use(torch.tensor([[0, 1], [1, 0]]), codebook_size=4)  # two codes, equally often
        {'used': 0.5, 'perplexity': 2.0}
    """
    counts = torch.bincount(codes.flatten(), minlength=int(torch.as_tensor(codebook_size).max())).double()
    share = counts / counts.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    return {"used": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}
