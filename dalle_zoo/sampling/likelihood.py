"""Likelihood of image tokens under a prior, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_zoo.models.image_prior import ImagePrior

# B images, T text positions, h w code grid


@torch.inference_mode()
def token_log_likelihood(prior: ImagePrior, text: Tensor, codes: Tensor, batch_size: int = 16) -> Tensor:
    """Log-likelihood of every image token, given the caption and the tokens before it.

    Args:
        prior: The prior.
        text: Text ids, int64 (B, T).
        codes: Image tokens, int64 (B, h, w).
        batch_size: Number of images per pass; affects memory and time only. Defaults to 16.

    Returns:
        Natural logarithms, float32 (B, h, w) on the CPU. Their sum over an image, divided by ln 2 and negated, is its
        length in bits.

    Raises:
        ValueError: Text and codes do not fit the prior.

    Example:
        >>> from dalle_zoo.models.prior import Prior, PriorConfig
        >>> shape = dict(text_length=4, text_vocab=8, image_height=2, image_width=2, codebook_size=16)
        >>> prior = Prior(PriorConfig(**shape, width=8, num_layers=1, num_heads=1, masks="row"))
        >>> text, codes = torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 2, 2, dtype=torch.long)
        >>> token_log_likelihood(prior, text, codes).shape
        torch.Size([3, 2, 2])
    """
    prior.check(text, codes)
    device = prior.device
    parts = []
    for some_text, some in zip(torch.split(text, batch_size), torch.split(codes, batch_size), strict=True):
        logits = prior.image_logits(some_text.to(device), some.to(device)).float()
        tokens = some.to(device).flatten(1)[..., None]
        parts.append(logits.log_softmax(-1).gather(-1, tokens).view(some.shape).cpu())
    return torch.cat(parts) if parts else torch.empty(codes.shape)
