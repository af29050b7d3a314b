"""Inception score: confident class predictions for each image, diverse predictions over all images."""

from __future__ import annotations

from torch import Tensor

from dalle_zoo_eval.metrics.base import METRICS
from dalle_zoo_eval.moments import StatisticsError

# n images, c classes

SHUFFLE_SEED = 2020
"""Seed with which torch-fidelity shuffles."""


@METRICS.register(
    "is", extractor="inception-2015", label="Inception score", format=".2f", sweep=True,
    source="Salimans et al., 2016", least=10_000, interval="deviation over splits",
)  # fmt: skip
def inception_score(logits: Tensor, *, splits: int = 10, seed: int | None = SHUFFLE_SEED) -> tuple[float, float]:
    """Returns ``exp(mean KL(p(y|x) || p(y)))`` of every split, by torch-fidelity.

    Logits are Inception's 1008 without the bias of the last layer. Published scores on CUB come from another network,
    fine-tuned on birds, and cannot be compared with these.

    Reference: Improved Techniques for Training GANs (Salimans et al., 2016), section 4.

    Args:
        logits: Logits of all images, (n, c).
        splits: Number of splits; split i has the images i n / splits to (i + 1) n / splits of the order. Defaults to
            10.
        seed: Seed of the order. None keeps the given order, as the code of the baselines does on MS-COCO. Defaults to
            `SHUFFLE_SEED`.

    Returns:
        Mean, in 1..c, and standard deviation (divided by ``splits``) over the splits.

    Raises:
        ValueError: The logits have another shape, or ``splits`` is less than 1.
        StatisticsError: There are fewer images than splits.

    Example:
        >>> import torch
        >>> mean, deviation = inception_score(100 * torch.eye(4), splits=1)  # each image of another class
        >>> round(float(mean), 3)
        4.0
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    if logits.ndim != 2 or splits < 1:
        raise ValueError(f"logits must be (n, c) and splits at least 1, got {tuple(logits.shape)} and {splits}")
    if len(logits) < splits:
        raise StatisticsError(f"{splits} splits need as many samples, got {len(logits)}")
    found = isc_features_to_metric(logits, splits, shuffle=seed is not None, rng_seed=seed)
    return found["inception_score_mean"], found["inception_score_std"]
