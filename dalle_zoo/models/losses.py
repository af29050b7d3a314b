"""Losses of the three stages, as pure functions of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# B batch, C channels, H W image, h w code grid, K codebook size, V vocabulary


def logit_laplace_nll(x: Tensor, mu: Tensor, log_scale: Tensor) -> Tensor:
    """Negative log-density of the logit-Laplace distribution, in nats, element by element.

    ``f(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x))`` on (0, 1): the law of the sigmoid of a
    Laplace variable. Reference: appendix A.3 of the paper.

    Args:
        x: Mapped pixels, strictly between 0 and 1.
        mu: Location on the logit scale, same shape.
        log_scale: ln b, same shape.
    """
    log_x, log_1mx = torch.log(x), torch.log1p(-x)
    deviation = (log_x - log_1mx - mu).abs()
    return deviation * torch.exp(-log_scale) + log_scale + math.log(2) + log_x + log_1mx


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL divergence from the categorical of the logits to the uniform one, nats per cell.

    ``ln K + sum_k q_k ln q_k`` without temperature and without noise, even while the relaxation is warm
    (answer of the first author, openai/DALL-E issue 26).

    Args:
        logits: Code logits, (B, K, h, w).

    Returns:
        (B, h, w), between 0 and ln K.
    """
    log_q = F.log_softmax(logits.float(), dim=1)
    return math.log(logits.shape[1]) + (log_q.exp() * log_q).sum(1)


def dvae_loss(
    x: Tensor, parameters: Tensor, logits: Tensor, kl_weight: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative evidence bound of the dVAE per pixel and channel (sections 2.1, A.2, A.3).

    The paper sums the likelihood over pixels and channels and the divergence over cells, and divides both by
    the number of pixel values. As a mean over values and a mean over cells that is
    ``mean(nll) + kl_weight * (cells / values) * mean(kl)``, which does not depend on the batch size.
    ``cells / values`` is 1/192 for the paper's 256 x 256 x 3 pixels and 32 x 32 cells.

    Args:
        x: Mapped pixels, (B, C, H, W).
        parameters: Decoder output, (B, 2C, H, W).
        logits: Code logits, (B, K, h, w).
        kl_weight: beta.

    Returns:
        The scalar loss, and its detached parts ``nll`` (nats per value) and ``kl`` (nats per cell).
    """
    mu, log_scale = parameters.chunk(2, dim=1)
    nll = logit_laplace_nll(x, mu, log_scale).mean()
    kl = kl_to_uniform(logits).mean()
    cells, values = logits[0, 0].numel(), x[0].numel()
    loss = nll + kl_weight * (cells / values) * kl
    return loss, {"nll": nll.detach(), "kl": kl.detach()}


def contrastive_loss(image_features: Tensor, text_features: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over a batch of pairs, the loss of CLIP (Radford et al., 2021).

    Args:
        image_features: Normalised, (B, d).
        text_features: Normalised, (B, d); row i belongs to picture i.
        scale: Inverse temperature, a scalar.
    """
    logits = scale * image_features @ text_features.t()
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
