"""The measures of today: against their packages where these are installed, against plain formulas, and by sight."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dalle_zoo_eval.metrics import METRICS
from dalle_zoo_eval.metrics import precision_recall as tiles
from dalle_zoo_eval.metrics.caption_match import clip_logit, pick_score
from dalle_zoo_eval.metrics.cmmd import cmmd
from dalle_zoo_eval.metrics.density_coverage import coverage, density
from dalle_zoo_eval.metrics.estimates import interval_of_mean
from dalle_zoo_eval.metrics.vendi import vendi_score
from dalle_zoo_eval.moments import StatisticsError
from torch import Tensor

CLOSE = 1e-4
REPEATS = 200
HITS = 0.88  # 95 % less four standard deviations of 200 repetitions, and the bootstrap's own error


def sample(n: int, seed: int, *, d: int = 6, shift: float = 0.0) -> Tensor:
    return shift + torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_density_and_coverage_equal_those_of_their_package() -> None:
    prdc = pytest.importorskip("prdc", reason="prdc of tests/requirements-parity.txt is not installed")
    real, generated = sample(80, 0), sample(60, 1, shift=0.5)
    expected = prdc.compute_prdc(real.numpy(), generated.numpy(), nearest_k=5)
    assert 0.1 < expected["coverage"] < 1
    assert density(generated, real)["value"] == pytest.approx(expected["density"], abs=CLOSE)
    assert coverage(generated, real)["value"] == pytest.approx(expected["coverage"], abs=CLOSE)


def test_density_and_coverage_by_their_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated, k = sample(30, 0).double(), sample(20, 1).double(), 3
    radii = [sorted(float((a - b).norm()) for b in real)[k] for a in real]
    inside = [[float((g - a).norm()) < r for a, r in zip(real, radii, strict=True)] for g in generated]
    monkeypatch.setattr(tiles, "COLUMNS", 7)
    found = density(generated, real, k=k)
    assert found["value"] == pytest.approx(np.sum(inside) / k / len(generated))
    assert found["low"] < found["value"] < found["high"]
    assert coverage(generated, real, k=k)["value"] == pytest.approx(np.any(inside, axis=0).mean())
    with pytest.raises(StatisticsError, match="5 neighbors need more samples, got 4"):
        density(sample(4, 0), real)


@pytest.mark.filterwarnings("ignore:Please import .* from the `scipy.*` namespace:DeprecationWarning")
def test_vendi_equals_its_package() -> None:
    vendi = pytest.importorskip(
        "vendi_score.vendi", reason="vendi-score of tests/requirements-parity.txt is not installed"
    )
    for n, d in ((40, 6), (5, 30)):
        features = sample(n, 0, d=d)
        assert vendi_score(features)["value"] == pytest.approx(vendi.score_X(features.double().numpy()), abs=CLOSE)


def test_vendi_counts_different_images() -> None:
    """Four directions that are orthogonal, repeated: four images, with nothing to vary."""
    found = vendi_score(torch.eye(7)[:4].repeat(10, 1))
    assert found["value"] == pytest.approx(4)
    assert found["low"] <= 4 <= found["high"]
    assert vendi_score(torch.ones(5, 3)) == pytest.approx({"value": 1, "low": 1, "high": 1})


def plain_cmmd(x: Tensor, y: Tensor) -> float:
    """Sums over all pairs, one by one."""

    def mean_kernel(a: list[list[float]], b: list[list[float]]) -> float:
        total = 0.0
        for one in a:
            for other in b:
                total += math.exp(-sum((p - q) ** 2 for p, q in zip(one, other, strict=True)) / 200)
        return total / len(a) / len(b)

    sides = [[[v / math.hypot(*row) for v in row] for row in side.tolist()] for side in (x, y)]
    a, b = sides
    return 1000 * (mean_kernel(a, a) - 2 * mean_kernel(a, b) + mean_kernel(b, b))


def test_cmmd_is_its_formula() -> None:
    x, y = sample(12, 0), sample(9, 1, shift=0.7)
    expected = plain_cmmd(x, y)
    assert expected > 1
    found = cmmd(x, y)
    assert found["value"] == pytest.approx(expected, rel=1e-9)
    assert found["low"] < found["value"] < found["high"]
    assert cmmd(x, x)["value"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="one d"):
        cmmd(x, sample(9, 1, d=5))


def test_logits_are_cosines_without_clipping() -> None:
    up = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    images = torch.tensor([[0.0, 2.0], [3**0.5, -1.0]])
    assert pick_score(images, up)["value"] == pytest.approx(25, abs=1e-5)
    assert clip_logit(-images, up)["value"] == pytest.approx(-25, abs=1e-5)
    with pytest.raises(ValueError, match="with B of at least 1"):
        pick_score(images, up[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cmmd", "vendi", "density"])
def test_intervals_cover_the_mean_of_other_samples(name: str) -> None:
    """Of 200 sets of one distribution, against a fixed reference: the interval holds the mean of all sets."""
    reference, found = sample(200, 10**6, shift=0.3), []
    for seed in range(REPEATS):
        metric = METRICS[name]()
        metric.update(features=sample(200, seed))
        if "real" in METRICS.spec(name).inputs:
            metric.update(features=reference, real=True)
        found.append({part: float(value) for part, value in metric.compute().items()})
    mean = sum(each["value"] for each in found) / REPEATS
    hits = sum(each["low"] <= mean <= each["high"] for each in found)
    assert hits / REPEATS >= HITS


def test_rounds_in_blocks_are_the_rounds_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = sample(50, 0)[:, 0]
    expected = interval_of_mean(values)
    monkeypatch.setattr("dalle_zoo_eval.metrics.estimates.BLOCK", 333)
    assert interval_of_mean(values) == expected
