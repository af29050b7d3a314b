"""Fréchet distance: closed forms of Gaussians, SciPy, and bias and spread of samples."""

from __future__ import annotations

import math

import pytest
import torch
from dalle_zoo_eval.metrics.frechet import (
    Extrapolation,
    Reference,
    bootstrap_interval,
    frechet_distance,
    frechet_extrapolated,
    influences,
)
from dalle_zoo_eval.moments import Moments, StatisticsError
from torch import Tensor


def moments(features: Tensor) -> Moments:
    return Moments.zero(features.shape[1]).add(features)


def moments_of(mean: Tensor, covariance: Tensor, count: int) -> Moments:
    """Returns the moments of ``count`` samples with a mean (d,) and a covariance (d, d, divided by n - 1)."""
    mean, covariance = mean.double(), covariance.double()
    outer = covariance * (count - 1) + count * torch.outer(mean, mean)
    return Moments(count=count, total=mean * count, outer=outer)


def gaussian(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double() * scale + shift


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(gaussian(d, d, seed=9)).Q


def test_commuting_covariances_match_closed_form() -> None:
    """With equal eigenvectors, the distance is ``|mu_a - mu_b|^2 + sum (sqrt(a) - sqrt(b))^2``."""
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 0.25]).double()
    turn = rotation(3)
    left = moments_of(torch.zeros(3), turn * a @ turn.t(), 10)
    right = moments_of(torch.tensor([1.0, 2.0, 2.0]), turn * b @ turn.t(), 10)
    expected = 9 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2
    assert frechet_distance(left, right) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(right, left) == pytest.approx(expected, rel=1e-12)


def test_two_dimensional_gaussians_match_closed_form() -> None:
    """With different eigenvectors, the trace of the root of a 2 x 2 product is ``sqrt(tr + 2 sqrt(det))``."""
    a = torch.tensor([[2.0, 0.3], [0.3, 1.0]]).double()
    b = torch.tensor([[1.0, -0.8], [-0.8, 3.0]]).double()
    root = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.linalg.det(a) * torch.linalg.det(b))))
    expected = float(a.trace() + b.trace()) - 2 * root
    zero = torch.zeros(2)
    got = frechet_distance(moments_of(zero, a, 5), moments_of(zero, b, 5))
    assert got == pytest.approx(expected, rel=1e-12)


def test_distance_equals_scipy_matrix_root() -> None:
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is missing: it is in the test extra")
    d = 48
    a, b = gaussian(500, d, 0) @ gaussian(d, d, 1), gaussian(400, d, 2, shift=0.5) @ gaussian(d, d, 3)
    cov_a, cov_b = (torch.cov(x.t()).numpy() for x in (a, b))
    mean = (a.mean(0) - b.mean(0)).square().sum().item()
    expected = mean + cov_a.trace() + cov_b.trace() - 2 * linalg.sqrtm(cov_a @ cov_b).real.trace()
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [3, 200])
def test_distance_to_itself_is_0(n: int) -> None:
    x = moments(gaussian(n, 32, 0) @ torch.diag(torch.logspace(1, -4, 32).double()))
    assert 0 <= frechet_distance(x, x) < 1e-9


def test_fewer_samples_than_features_give_correct_distance() -> None:
    """Features of a plane that are rotated into 64 dimensions keep their distance."""
    a, b = gaussian(20, 2, 0), gaussian(300, 2, 1, scale=2, shift=1)
    turn = rotation(64)[:2]
    lifted = frechet_distance(moments(a @ turn), moments(b @ turn))
    assert lifted == pytest.approx(frechet_distance(moments(a), moments(b)), rel=1e-6)


def test_constant_features_have_no_covariance() -> None:
    point = moments(torch.zeros(5, 3))
    cloud = moments_of(torch.tensor([2.0, 0.0, 0.0]), torch.eye(3), 10)
    assert frechet_distance(point, cloud) == pytest.approx(4 + 3)
    assert frechet_distance(point, point) == 0


def test_incompatible_moments_raise() -> None:
    with pytest.raises(StatisticsError, match="equally long, got 3 and 4"):
        frechet_distance(moments(gaussian(5, 3, 0)), moments(gaussian(6, 4, 0)))
    with pytest.raises(StatisticsError, match="at least 2 samples"):
        frechet_distance(moments(gaussian(1, 3, 0)), moments(gaussian(6, 3, 0)))


def white(d: int, count: int = 10**6) -> Reference:
    """Returns the standard Gaussian as a reference."""
    return Reference.of(moments_of(torch.zeros(d), torch.eye(d), count))


def interval(features: Tensor, reference: Reference, **options: float) -> tuple[float, float]:
    return bootstrap_interval(features, moments(features), reference, **options)  # type: ignore[arg-type]


def at_infinity(features: Tensor, reference: Reference, seed: int = 0) -> Extrapolation:
    return frechet_extrapolated(features, moments(features), reference, seed=seed)


@pytest.mark.parametrize("n", [20, 40, 500])
def test_reference_distance_equals_frechet_distance(n: int) -> None:
    """Either side may have fewer samples than the 32 features."""
    few, many = moments(gaussian(n, 32, 0)), moments(gaussian(300, 32, 1, scale=2))
    for one, other in ((few, many), (many, few)):
        assert Reference.of(one).distance(other) == pytest.approx(frechet_distance(few, many), rel=1e-9)


def test_extrapolation_removes_bias() -> None:
    """The samples are from the Gaussian of the reference: the true distance is 0, that of 1000 samples is larger."""
    features, reference = gaussian(1000, 32, 0), white(32)
    biased = reference.distance(moments(features))
    found = at_infinity(features, reference)
    assert biased > 0.2
    assert abs(found.value) < biased / 10
    assert found.slope / 1000 == pytest.approx(biased, rel=0.1)
    assert found.sizes[0] == 200
    assert found.sizes[-1] == 1000
    assert found.distances[-1] == pytest.approx(biased, rel=1e-9)
    assert list(found.distances) == sorted(found.distances, reverse=True)


def test_extrapolation_depends_only_on_seed() -> None:
    features, reference = gaussian(100, 8, 0, shift=0.2), white(8)
    assert at_infinity(features, reference) == at_infinity(features, reference)
    assert at_infinity(features, reference) != at_infinity(features, reference, seed=1)
    with pytest.raises(StatisticsError, match="at least 24 samples of 8 features, got 23"):
        at_infinity(features[:23], reference)


def test_influences_are_derivatives_by_sample_weight() -> None:
    x = gaussian(60, 4, 0) * torch.tensor([1.0, 2.0, 0.5, 1.0]) + 0.3
    reference = Reference.of(moments(gaussian(80, 4, 1)))

    def distance(weight: Tensor) -> float:
        share = weight / weight.sum()
        mean = share @ x
        covariance = (share[:, None] * (x - mean)).t() @ (x - mean) * 60 / 59
        return reference.distance(moments_of(mean, covariance, 60))

    found = influences(x, moments(x), reference)
    assert float(found.mean()) == pytest.approx(0, abs=1e-12)
    for sample in (0, 17, 59):
        step = torch.zeros(60).double()
        step[sample] = 1e-4
        slope = 60 * (distance(1 + step) - distance(1 - step)) / 2e-4
        assert float(found[sample]) == pytest.approx(slope, rel=0.03, abs=0.02)  # n or n - 1


def test_interval_width_matches_repeated_experiments() -> None:
    """The interval is compared with distances of other samples of the same size."""
    reference = white(8)
    generates = [gaussian(400, 8, seed, shift=0.3) for seed in range(60)]
    values = torch.tensor([reference.distance(moments(x)) for x in generates], dtype=torch.float64)
    low, high = interval(generates[0], reference)
    assert (high - low) / 2 == pytest.approx(1.96 * float(values.std()), rel=0.3)
    assert (low + high) / 2 == pytest.approx(float(values[0]), abs=0.1 * (high - low))
    narrow = interval(generates[0], reference, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert (low, high) == interval(generates[0], reference)


def test_linear_part_has_spread_of_distance() -> None:
    """The spread is compared with a bootstrap of full distances, with half as many samples per feature as usual."""
    d, n = 32, 240
    x = gaussian(n, d, 0, scale=1.2, shift=0.1) * torch.arange(1, d + 1).double() ** -0.5
    reference = Reference.of(moments(gaussian(900, d, 1) * torch.arange(1, d + 1).double() ** -0.5))
    random = torch.Generator().manual_seed(0)
    generated = [reference.distance(moments(x[torch.randint(n, (n,), generator=random)])) for _ in range(200)]
    low, high = interval(x, reference)
    assert (high - low) / 2 == pytest.approx(1.96 * float(torch.tensor(generated).std()), rel=0.2)


def test_interval_with_few_samples_raises() -> None:
    with pytest.raises(StatisticsError, match="more than 8 samples"):
        interval(gaussian(8, 8, 0), white(8))
    with pytest.raises(ValueError, match="at least 2"):
        interval(gaussian(20, 8, 0), white(8), rounds=1)
