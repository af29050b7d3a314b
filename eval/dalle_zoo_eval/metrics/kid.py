"""Kernel distance; with Inception's features it is the KID."""

from __future__ import annotations

from torch import Tensor

from dalle_zoo_eval.metrics.base import METRICS, check_sides
from dalle_zoo_eval.moments import StatisticsError

# n samples, d features


@METRICS.register(
    "kid", extractor="inception-2015", lower_is_better=True, label="KID", source="Binkowski et al., 2018", least=1000,
    interval="deviation over subsets",
)  # fmt: skip
def kernel_distance(
    features: Tensor, real_features: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Returns the kernel distance of two sets of features, computed by torch-fidelity in float64.

    It is the unbiased squared maximum mean discrepancy with the kernel ``(x.y / d + 1)^3`` over random subsets.
    Similar sides can have values slightly below 0.

    Reference: Demystifying MMD GANs (Binkowski et al., 2018).

    Args:
        features: Features of the generated side, (n, d).
        real_features: Features of the reference side, (m, d).
        subsets: Number of subsets. Defaults to 100.
        subset_size: Samples per subset and side, at least 2. Defaults to 1000.
        seed: Seed of the subsets. Defaults to 2020, as in torch-fidelity.

    Returns:
        Mean and standard deviation (divided by ``subsets``) over the subsets.

    Raises:
        ValueError: Features have different lengths, or an option is out of range.
        StatisticsError: A side has fewer samples than a subset.

    Example:
        >>> import torch
        >>> real = torch.randn(20, 4)
        >>> far, near = (kernel_distance(real + shift, real, subsets=2, subset_size=20)[0] for shift in (1, 0))
        >>> bool(far > near)
        True
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = features, real_features
    check_sides(a, b)
    if subset_size < 2 or subsets < 1:
        raise ValueError(f"subset_size must be at least 2 and subsets 1, got {subset_size} and {subsets}")
    if min(len(a), len(b)) < subset_size:
        raise StatisticsError(f"subsets of {subset_size} need as many samples, got {min(len(a), len(b))}")
    found = kid_features_to_metric(
        a.double(), b.double(), kid_subsets=subsets, kid_subset_size=subset_size, rng_seed=seed, verbose=False
    )
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]
