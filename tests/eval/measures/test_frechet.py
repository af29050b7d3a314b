"""Frechet distance: closed forms on Gaussians, scipy, bias and spread of samples."""

from __future__ import annotations

import math

import pytest
import torch
from dalle_zoo_eval.measures.frechet import bootstrap_interval, frechet_distance, frechet_extrapolated
from dalle_zoo_eval.statistics import Moments, StatisticsError
from torch import Tensor


def moments(features: Tensor) -> Moments:
    return Moments.zero(features.shape[1]).add(features)


def gaussian(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double() * scale + shift


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(gaussian(d, d, seed=9)).Q


def test_gaussians_that_commute_have_a_closed_form() -> None:
    """Equal axes: ``|mu_a - mu_b|^2 + sum (sqrt(a) - sqrt(b))^2``."""
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 0.25]).double()
    turn = rotation(3)
    left = Moments.exact(torch.zeros(3), turn * a @ turn.t(), 10)
    right = Moments.exact(torch.tensor([1.0, 2.0, 2.0]), turn * b @ turn.t(), 10)
    expected = 9 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2
    assert frechet_distance(left, right) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(right, left) == pytest.approx(expected, rel=1e-12)


def test_gaussians_of_two_dimensions_have_a_closed_form() -> None:
    """Unlike axes: the trace of the root of a 2 x 2 product is ``sqrt(tr + 2 sqrt(det))``."""
    a = torch.tensor([[2.0, 0.3], [0.3, 1.0]]).double()
    b = torch.tensor([[1.0, -0.8], [-0.8, 3.0]]).double()
    root = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.linalg.det(a) * torch.linalg.det(b))))
    expected = float(a.trace() + b.trace()) - 2 * root
    zero = torch.zeros(2)
    got = frechet_distance(Moments.exact(zero, a, 5), Moments.exact(zero, b, 5))
    assert got == pytest.approx(expected, rel=1e-12)


def test_it_equals_scipys_matrix_root() -> None:
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is missing: it is in the test extra")
    d = 48
    a, b = gaussian(500, d, 0) @ gaussian(d, d, 1), gaussian(400, d, 2, shift=0.5) @ gaussian(d, d, 3)
    cov_a, cov_b = (torch.cov(x.t()).numpy() for x in (a, b))
    mean = (a.mean(0) - b.mean(0)).square().sum().item()
    expected = mean + cov_a.trace() + cov_b.trace() - 2 * linalg.sqrtm(cov_a @ cov_b).real.trace()
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [3, 200])
def test_a_set_has_no_distance_to_itself(n: int) -> None:
    x = moments(gaussian(n, 32, 0) @ torch.diag(torch.logspace(1, -4, 32).double()))
    assert 0 <= frechet_distance(x, x) < 1e-9


def test_fewer_samples_than_features_still_give_the_distance_of_their_covariances() -> None:
    """Features in a plane, turned into 64 dimensions, are as far apart as in the plane."""
    a, b = gaussian(20, 2, 0), gaussian(300, 2, 1, scale=2, shift=1)
    turn = rotation(64)[:2]
    lifted = frechet_distance(moments(a @ turn), moments(b @ turn))
    assert lifted == pytest.approx(frechet_distance(moments(a), moments(b)), rel=1e-6)


def test_constant_features_are_a_point() -> None:
    point = moments(torch.zeros(5, 3))
    cloud = Moments.exact(torch.tensor([2.0, 0.0, 0.0]), torch.eye(3), 10)
    assert frechet_distance(point, cloud) == pytest.approx(4 + 3)
    assert frechet_distance(point, point) == 0


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(StatisticsError, match="equally long, got 3 and 4"):
        frechet_distance(moments(gaussian(5, 3, 0)), moments(gaussian(6, 4, 0)))
    with pytest.raises(StatisticsError, match="at least 2 samples"):
        frechet_distance(moments(gaussian(1, 3, 0)), moments(gaussian(6, 3, 0)))


def test_the_line_to_infinity_takes_the_bias_away() -> None:
    """Samples of the reference's own Gaussian: the true distance is 0, that of 1000 samples is not."""
    d = 32
    reference = Moments.exact(torch.zeros(d), torch.eye(d), 10**6)
    features = gaussian(1000, d, 0)
    biased = frechet_distance(moments(features), reference)
    found = frechet_extrapolated(features, reference)
    assert biased > 0.2
    assert abs(found.value) < biased / 10
    assert found.slope / 1000 == pytest.approx(biased, rel=0.1)
    assert found.sizes[0] == 200
    assert found.sizes[-1] == 1000
    assert found.distances[-1] == pytest.approx(biased, rel=1e-9)
    assert list(found.distances) == sorted(found.distances, reverse=True)


def test_the_line_to_infinity_depends_on_the_seed_alone() -> None:
    reference = Moments.exact(torch.zeros(8), torch.eye(8), 100)
    features = gaussian(100, 8, 0, shift=0.2)
    assert frechet_extrapolated(features, reference) == frechet_extrapolated(features, reference)
    assert frechet_extrapolated(features, reference) != frechet_extrapolated(features, reference, seed=1)
    with pytest.raises(StatisticsError, match="at least 24 samples of 8 features, got 23"):
        frechet_extrapolated(features[:23], reference)


def test_the_interval_has_the_width_of_repeated_experiments() -> None:
    """Compared with what other draws of as many samples really give."""
    d = 8
    reference = Moments.exact(torch.zeros(d), torch.eye(d), 10**6)
    draws = [gaussian(400, d, seed, shift=0.3) for seed in range(60)]
    values = torch.tensor([frechet_distance(moments(x), reference) for x in draws], dtype=torch.float64)
    low, high = bootstrap_interval(draws[0], reference, rounds=60)
    assert (low + high) / 2 == pytest.approx(float(values[0]), rel=1e-9)
    assert (high - low) / 2 == pytest.approx(1.96 * float(values.std()), rel=0.3)
    narrow = bootstrap_interval(draws[0], reference, rounds=60, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert (low, high) == bootstrap_interval(draws[0], reference, rounds=60)


def test_no_interval_without_enough_samples() -> None:
    reference = Moments.exact(torch.zeros(8), torch.eye(8), 100)
    with pytest.raises(StatisticsError, match="more than 8 samples"):
        bootstrap_interval(gaussian(8, 8, 0), reference)
    with pytest.raises(ValueError, match="at least 2"):
        bootstrap_interval(gaussian(20, 8, 0), reference, rounds=1)
