"""Sums of features: closed forms, any split of the samples, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dalle_zoo_eval.moments import Moments, StatisticsError, regrouped
from safetensors.torch import save_file

# Sums in another order differ by rounding of float64 alone.
ROUNDING = 1e-12


def features(n: int = 50, d: int = 4) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * 3 + 100


def summed(x: torch.Tensor, *batch_sizes: int) -> Moments:
    moments = Moments.zero(x.shape[1])
    for part in x.split(list(batch_sizes) or len(x)):
        moments = moments.add(part)
    return moments


def test_mean_and_covariance_are_those_of_the_samples() -> None:
    x = features()
    moments = summed(x)
    assert moments.count == 50
    assert moments.outer.dtype == torch.float64
    assert torch.allclose(moments.mean, x.double().mean(0), rtol=ROUNDING)
    assert torch.allclose(moments.covariance, torch.cov(x.double().t()), rtol=1e-9)


@pytest.mark.parametrize("sizes", [(50,), (1,) * 50, (7, 13, 30), (49, 1)])
def test_batches_and_processes_change_nothing(sizes: tuple[int, ...]) -> None:
    x = features()
    streamed = summed(x, *sizes)
    combined = Moments.zero(4)
    for part in x.split(list(sizes)):
        combined = combined + summed(part)
    for moments in (streamed, combined):
        assert moments.count == 50
        assert torch.allclose(moments.total, summed(x).total, rtol=ROUNDING)
        assert torch.allclose(moments.outer, summed(x).outer, rtol=ROUNDING)


def test_parts_stream_and_samples_can_be_taken_out() -> None:
    x = features(5000)
    streamed = Moments.of_parts(x.split(7))
    assert torch.equal(streamed.outer, Moments.of_parts(iter(x.split(7))).outer)
    assert torch.allclose(streamed.outer, summed(x).outer, rtol=ROUNDING)
    rest = streamed - summed(x[:1200])
    assert rest.count == 3800
    assert torch.allclose(rest.covariance, summed(x[1200:]).covariance, rtol=1e-9)
    with pytest.raises(StatisticsError, match="no features"):
        Moments.of_parts([])


def test_rows_in_larger_parts() -> None:
    x = torch.arange(10)
    parts = list(regrouped(x.split(3), 5))
    assert [len(part) for part in parts] == [6, 4]
    assert torch.equal(torch.cat(parts), x)


def test_equal_chunks_give_equal_bits() -> None:
    first, second = (summed(features(), 20, 20, 10) for _ in range(2))
    assert torch.equal(first.outer, second.outer)


def test_float16_sums_do_not_stall() -> None:
    moments = summed(torch.full((5000, 1), 1.0).half())
    assert moments.total.item() == moments.outer.item() == 5000


def test_exact_moments_give_back_what_they_were_made_of() -> None:
    mean, covariance = torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    moments = Moments.exact(mean, covariance, 7)
    assert torch.allclose(moments.mean, mean.double())
    assert torch.allclose(moments.covariance, covariance.double())
    with pytest.raises(StatisticsError, match=r"\(d,\) and \(d, d\)"):
        Moments.exact(mean, covariance[:1], 7)


def test_too_few_samples_are_refused_or_flagged() -> None:
    with pytest.raises(StatisticsError, match="no samples"):
        _ = Moments.zero(4).mean
    with pytest.raises(StatisticsError, match="at least 2 samples, got 1"):
        _ = summed(features(1)).covariance
    assert summed(features(4)).rank_deficient
    assert not summed(features(5)).rank_deficient


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_features_are_refused(bad: float) -> None:
    x = features()
    x[3, 2] = bad
    with pytest.raises(StatisticsError, match="NaN or infinity"):
        summed(x)


def test_features_of_another_network_are_refused() -> None:
    with pytest.raises(StatisticsError, match=r"\(n, 4\), got \(50, 3\)"):
        Moments.zero(4).add(features(d=3))
    with pytest.raises(StatisticsError, match="4 and of 3 features"):
        _ = Moments.zero(4) + Moments.zero(3)


def test_files_keep_every_bit(tmp_path: Path) -> None:
    moments = summed(features())
    moments.save(tmp_path / "deep" / "a.safetensors")
    again = Moments.load(tmp_path / "deep" / "a.safetensors")
    assert again.count == moments.count
    assert torch.equal(again.total, moments.total)
    assert torch.equal(again.outer, moments.outer)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.safetensors"]


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(StatisticsError, match=r"a\.safetensors cannot be read"):
        Moments.load(path)
    summed(features()).save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StatisticsError, match="delete it and measure again"):
        Moments.load(path)
    save_file({"count": torch.tensor(3), "total": torch.zeros(2), "outer": torch.full((2, 2), torch.nan)}, path)
    with pytest.raises(StatisticsError, match="holds NaN or infinity: delete it"):
        Moments.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(StatisticsError, match="must hold count"):
        Moments.load(path)
