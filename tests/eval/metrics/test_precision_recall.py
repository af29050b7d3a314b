"""Precision and recall, compared with individual distances and for sets with obvious values."""

from __future__ import annotations

import pytest
import torch
from dalle_zoo_eval.metrics import precision_recall as module
from torch import Tensor


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    measures = module.precision, module.recall
    found = [measure(generated, reference, k=k) for measure in measures]
    assert all(each["low"] <= each["value"] <= each["high"] for each in found)
    return found[0]["value"], found[1]["value"]


def by_hand(reference: Tensor, generated: Tensor, k: int) -> tuple[float, float]:
    def share(points: Tensor, centers: Tensor) -> float:
        radii = [sorted(float((c - other).norm()) for other in centers)[k] for c in centers]
        near = [any(float((p - c).norm()) <= r for c, r in zip(centers, radii, strict=True)) for p in points]
        return sum(near) / len(near)

    return share(generated, reference), share(reference, generated)


def sample(n: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize("k", [1, 3, 5])
def test_values_equal_definition(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, generated = sample(40, 0), sample(25, 1, shift=1)
    expected = by_hand(reference.double(), generated.double(), k)
    assert min(expected) > 0.1
    assert max(expected) < 1
    assert precision_recall(reference, generated, k) == pytest.approx(expected)
    monkeypatch.setattr(module, "ROWS", 7)
    monkeypatch.setattr(module, "COLUMNS", 11)
    assert precision_recall(reference, generated, k) == pytest.approx(expected)


def test_collapsed_model_has_precision_without_recall() -> None:
    """The reference is a line of 20 points; the model repeats points near the first."""
    reference = torch.arange(20.0)[:, None] * torch.tensor([[1.0, 0.0]])
    generated = torch.tensor([[0.0, 0.1], [0.1, 0.0], [0.0, -0.1], [-0.1, 0.0], [0.0, 0.0]])
    precision, recall = precision_recall(reference, generated)
    assert precision == 1
    assert recall == 1 / 20
    assert precision_recall(generated, reference) == (recall, precision)


def test_set_with_duplicates_covers_itself() -> None:
    """Spheres of radius 0 hold their center, far from the origin too."""
    x = torch.cat([sample(5, 0).repeat(6, 1), sample(20, 1)]) + 1000
    assert precision_recall(x, x.clone()) == (1, 1)
    assert precision_recall(x, sample(30, 2)) == (0, 0)


def test_wrong_input_raises() -> None:
    with pytest.raises(ValueError, match="4 neighbors need more samples, got 4"):
        precision_recall(sample(10, 0), sample(4, 1), k=4)
    with pytest.raises(ValueError, match="one d"):
        precision_recall(sample(10, 0), sample(10, 1)[:, :2])
