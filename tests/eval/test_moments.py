"""Sums of features: closed forms, and any split of the samples."""

from __future__ import annotations

import pytest
import torch
from dalle_zoo_eval.moments import Moments, StatisticsError, regrouped

# Sums in another order differ by rounding of float64 alone.
ROUNDING = 1e-12


def features(n: int = 50, d: int = 4) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * 3 + 100


def summed(x: torch.Tensor, *batch_sizes: int) -> Moments:
    moments = Moments.zero(x.shape[1])
    for part in x.split(list(batch_sizes) or len(x)):
        moments = moments.add(part)
    return moments


def test_mean_and_covariance_equal_those_of_samples() -> None:
    x = features()
    moments = summed(x)
    assert moments.count == 50
    assert moments.outer.dtype == torch.float64
    assert torch.allclose(moments.mean, x.double().mean(0), rtol=ROUNDING)
    assert torch.allclose(moments.covariance, torch.cov(x.double().t()), rtol=1e-9)


@pytest.mark.parametrize("sizes", [(50,), (1,) * 50, (7, 13, 30), (49, 1)])
def test_moments_do_not_depend_on_batches(sizes: tuple[int, ...]) -> None:
    x = features()
    streamed = summed(x, *sizes)
    combined = Moments.zero(4)
    for part in x.split(list(sizes)):
        combined = combined + summed(part)
    for moments in (streamed, combined):
        assert moments.count == 50
        assert torch.allclose(moments.total, summed(x).total, rtol=ROUNDING)
        assert torch.allclose(moments.outer, summed(x).outer, rtol=ROUNDING)


def test_parts_are_streamed_and_samples_can_be_subtracted() -> None:
    x = features(5000)
    streamed = Moments.of_parts(x.split(7))
    assert torch.equal(streamed.outer, Moments.of_parts(iter(x.split(7))).outer)
    assert torch.allclose(streamed.outer, summed(x).outer, rtol=ROUNDING)
    rest = streamed - summed(x[:1200])
    assert rest.count == 3800
    assert torch.allclose(rest.covariance, summed(x[1200:]).covariance, rtol=1e-9)
    with pytest.raises(StatisticsError, match="no features"):
        Moments.of_parts([])


def test_regrouped_yields_larger_parts() -> None:
    x = torch.arange(10)
    parts = list(regrouped(zip(x.split(3), (-x).split(3), strict=True), 5))
    assert [len(rows) for rows, _ in parts] == [6, 4]
    assert torch.equal(torch.cat([rows for rows, _ in parts]), x)
    assert all(rows.equal(-others) for rows, others in parts)
    assert [len(rows) for (rows,) in regrouped(zip(x.split(3)), 0)] == [3, 3, 3, 1]


def test_equal_chunks_give_equal_bits() -> None:
    first, second = (summed(features(), 20, 20, 10) for _ in range(2))
    assert torch.equal(first.outer, second.outer)


def test_float16_sums_do_not_stall() -> None:
    moments = summed(torch.full((5000, 1), 1.0).half())
    assert moments.total.item() == moments.outer.item() == 5000


def test_too_few_samples_raise_or_are_flagged() -> None:
    with pytest.raises(StatisticsError, match="no samples"):
        _ = Moments.zero(4).mean
    with pytest.raises(StatisticsError, match="at least 2 samples, got 1"):
        _ = summed(features(1)).covariance
    assert summed(features(4)).rank_deficient
    assert not summed(features(5)).rank_deficient


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_features_raise(bad: float) -> None:
    x = features()
    x[3, 2] = bad
    with pytest.raises(StatisticsError, match="NaN or infinity"):
        summed(x)


def test_features_of_another_length_raise() -> None:
    with pytest.raises(StatisticsError, match=r"\(n, 4\), got \(50, 3\)"):
        Moments.zero(4).add(features(d=3))
    with pytest.raises(StatisticsError, match="4 and of 3 features"):
        _ = Moments.zero(4) + Moments.zero(3)


def test_exact_returns_moments_with_the_given_mean_and_covariance() -> None:
    mean, covariance = torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    moments = Moments.exact(mean, covariance, 7)
    assert torch.allclose(moments.mean, mean.double())
    assert torch.allclose(moments.covariance, covariance.double())
    with pytest.raises(StatisticsError, match=r"\(d,\) and \(d, d\)"):
        Moments.exact(mean, covariance[:1], 7)
