"""Losses of the three stages, as pure functions of tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# B batch, C channels, H W image, h w code grid, K codebook size, V vocabulary, M positions, d width

LOGITS = 2**25
"""Largest number of logits of a head in memory at once."""
LOGITS_ON_CPU = 2**22
"""The same on a CPU, where the logits should fit into its caches."""


def logit_laplace_nll(x: Tensor, mu: Tensor, log_scale: Tensor) -> Tensor:
    """Elementwise negative log-density of the logit-Laplace distribution, nats.

    ``f(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x))`` on (0, 1): the distribution of the sigmoid
    of a Laplace variable. Reference: appendix A.3 of the paper.

    Args:
        x: Mapped pixels, strictly between 0 and 1.
        mu: Location on the logit scale, same shape.
        log_scale: ln b, same shape.

    Example:
        >>> nll = logit_laplace_nll(torch.tensor([0.5, 0.9]), mu=torch.zeros(2), log_scale=torch.zeros(2))
        >>> nll.round(decimals=3)  # the pixel at the location is more likely
        tensor([-0.6930,  0.4820])
    """
    log_x, log_1mx = torch.log(x), torch.log1p(-x)
    deviation = (log_x - log_1mx - mu).abs()
    return deviation * torch.exp(-log_scale) + log_scale + math.log(2) + log_x + log_1mx


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL divergence from the categorical of the logits to the uniform one, nats per cell.

    ``ln K + sum_k q_k ln q_k`` without temperature and without noise, even while the temperature of the
    relaxation is high (answer of the first author, openai/DALL-E issue 26).

    Args:
        logits: Code logits, (B, K, h, w).

    Returns:
        (B, h, w), between 0 and ln K.

    Example:
        >>> logits = torch.zeros(1, 8, 1, 2)
        >>> logits[0, 0, 0, 1] = 100  # the second cell is certain of a code
        >>> kl_to_uniform(logits).abs().round(decimals=3)  # 0 and ln 8
        tensor([[[0.0000, 2.0790]]])
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

    Example:
        >>> x, parameters, logits = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 6, 8, 8), torch.randn(1, 16, 1, 1)
        >>> loss, parts = dvae_loss(x, parameters, logits, kl_weight=6.6)
        >>> torch.allclose(loss, parts["nll"] + 6.6 * parts["kl"] / 192)  # a cell for 8 x 8 x 3 values
        True
    """
    mu, log_scale = parameters.chunk(2, dim=1)
    nll = logit_laplace_nll(x, mu, log_scale).mean()
    kl = kl_to_uniform(logits).mean()
    cells, values = logits[0, 0].numel(), x[0].numel()
    loss = nll + kl_weight * (cells / values) * kl
    return loss, {"nll": nll.detach(), "kl": kl.detach()}


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Cross-entropy of a head's predictions, nats, summed over positions in parts that need little memory.

    The value is ``cross_entropy(linear(hidden, weight, bias).float(), target, reduction="sum")``. The forward pass
    also computes the gradients while it has the logits of a part; the backward pass only multiplies them by the
    gradient of the loss. No logit is computed twice. A graph with this loss supports one backward pass; PyTorch raises
    an error at the second.

    Args:
        hidden: Inputs of the head, (M, d); no rows give 0.
        weight: Matrix of the head, (V, d).
        bias: Bias of the head, (V,); None for a head without one.
        target: Target tokens, int64 (M,).

    Returns:
        Scalar, float32 or wider.

    Example:
        >>> hidden, weight, target = torch.randn(5, 4), torch.randn(7, 4), torch.arange(5)
        >>> expected = F.cross_entropy(F.linear(hidden, weight), target, reduction="sum")
        >>> torch.allclose(head_loss(hidden, weight, None, target), expected, atol=1e-4)
        True
    """
    apply: Any = HeadLoss.apply  # typed in some versions of PyTorch only
    summed: Tensor = apply(hidden, weight, bias, target, torch.is_grad_enabled())
    return summed


class HeadLoss(torch.autograd.Function):
    """Autograd function of `head_loss`; under autocast its products are computed in the dtype of autocast."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, graded: bool) -> Tensor:
        """Computes the sum and the gradients that are needed; none in validation, where ``graded`` is False."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        summed = hidden.new_zeros((), dtype=wide)
        for_inputs, for_weight, for_bias = (graded and needed for needed in ctx.needs_input_grad[:3])
        inputs_gradient = torch.empty_like(hidden) if for_inputs else None
        weight_gradient = torch.zeros_like(weight, dtype=wide) if for_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=wide) if bias is not None and for_bias else None
        with torch.autocast(device, enabled=False):
            matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            rows = max(1, (LOGITS_ON_CPU if device == "cpu" else LOGITS) // len(weight))
            for start in range(0, len(hidden), rows):
                inputs, wants = hidden[start : start + rows].to(dtype), target[start : start + rows, None]
                log_probs = F.linear(inputs, matrix, offset).log_softmax(-1, dtype=wide)
                summed -= log_probs.gather(1, wants).sum()
                if not (for_inputs or for_weight or for_bias):
                    continue
                errors = log_probs.exp_().scatter_add_(1, wants, log_probs.new_full(wants.shape, -1.0))
                if bias_gradient is not None:
                    bias_gradient += errors.sum(0)
                errors = errors.to(dtype)  # the gradient of the logits
                if inputs_gradient is not None:
                    inputs_gradient[start : start + rows] = errors @ matrix
                if weight_gradient is not None:
                    _add_product(weight_gradient, errors.t(), inputs)
        ctx.save_for_backward(inputs_gradient, weight_gradient, bias_gradient)
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
        return summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Multiplies the stored gradients by that of the sum, in place because the matrix of a head is large."""
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        gradients = (None if x is None else x.mul_(gradient).to(dtype) for x, dtype in saved)
        return (*gradients, None, None)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Computes ``total += left @ right`` in the dtype of the total."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def reduce_gradient(x: Tensor, factor: float) -> Tensor:
    """Returns the values of a tensor, whose gradient is multiplied by a factor in the backward pass.

    Reference: CogView (Ding et al., 2021), section 2.4, which trains embeddings with a tenth of their gradient.

    Example:
        >>> x = torch.ones((), requires_grad=True)
        >>> reduce_gradient(x, 0.1).backward()
        >>> x.grad
        tensor(0.1000)
    """
    constant = x.detach()
    return constant + factor * (x - constant)  # exactly x


def contrastive_loss(image_features: Tensor, text_features: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over a batch of pairs, the loss of CLIP (Radford et al., 2021).

    Args:
        image_features: Normalized features, (B, d).
        text_features: Normalized features, (B, d); row i belongs to image i.
        scale: Inverse temperature, a scalar.

    Example:
        >>> features = torch.eye(4)
        >>> [round(contrastive_loss(features, features, torch.tensor(scale)).item(), 3) for scale in (0.0, 100.0)]
        [1.386, 0.0]
    """
    logits = scale * image_features @ text_features.t()
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
