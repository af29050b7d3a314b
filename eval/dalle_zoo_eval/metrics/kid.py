"""Kernel distance: with Inception's features, the KID."""

from __future__ import annotations

from torch import Tensor

from dalle_zoo_eval.metrics.base import METRICS, check_sides
from dalle_zoo_eval.moments import StatisticsError

# n samples, m of them in a subset, d features


@METRICS.register(
    "kid", extractor="inception-2015", lower_is_better=True, label="KID", source="Binkowski et al., 2018", least=1000,
    interval="deviation over subsets",
)  # fmt: skip
def kernel_distance(
    features: Tensor, real_features: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Returns torch-fidelity's kernel distance of features, in float64.

    The squared maximum mean discrepancy with the kernel ``(x.y / d + 1)^3``, unbiased, over random subsets. Values
    slightly below 0 are right where both sides are alike.

    Reference: Demystifying MMD GANs (Binkowski et al., 2018).

    Args:
        features: (n, d) of one side.
        real_features: (m, d) of the other.
        subsets: Repetitions.
        subset_size: m, at most the samples of a side and at least 2.
        seed: Seed of the subsets.

    Returns:
        Mean and standard deviation (divided by ``subsets``) over the subsets.

    Raises:
        ValueError: Features of different lengths.
        StatisticsError: Fewer samples than a subset needs.
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
