"""Inception score: sure of each image, undecided over all of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# n images, c classes

SHUFFLE_SEED = 2020
"""Seed of torch-fidelity's order, so that equal logits give its numbers."""


def inception_score(logits: Tensor, splits: int = 10, *, seed: int | None = SHUFFLE_SEED) -> tuple[float, float]:
    """``exp(mean KL(p(y|x) || p(y)))`` of every split.

    Split i holds images i n / splits to (i + 1) n / splits, both rounded down, of the order, which matters:

    - ``seed=2020`` (default) is the permutation of NumPy's ``RandomState(2020)``, as in torch-fidelity.
    - ``seed=None`` leaves images as they are listed, as the code of the baselines does on MS-COCO.

    Logits are Inception's 1008 without the bias of the last layer. Published scores on CUB come from another network,
    fine-tuned on birds, and cannot be compared with these.

    Reference: Improved Techniques for Training GANs (Salimans et al., 2016), section 4.

    Args:
        logits: (n, c).
        splits: Parts of the images.
        seed: Seed of the order.

    Returns:
        Mean and standard deviation (divided by ``splits``) over the splits; between 1 and c.

    Raises:
        ValueError: Fewer images than splits.
    """
    if logits.ndim != 2 or not 1 <= splits <= len(logits):
        raise ValueError(f"logits must be (n, c) with n at least the {splits} splits, got {tuple(logits.shape)}")
    n = len(logits)
    if seed is not None:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(n))]
    logs = logits.double().log_softmax(1)
    scores = []
    for i in range(splits):
        part = logs[i * n // splits : (i + 1) * n // splits]
        marginal = part.logsumexp(0) - np.log(len(part))
        # A class of share 0 adds nothing, whatever its logarithm.
        divergence = torch.where(part.isneginf(), 0, part.exp() * (part - marginal)).sum(1)
        scores.append(divergence.mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))
