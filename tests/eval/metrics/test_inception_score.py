"""Inception score of known distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dalle_zoo_eval.metrics.inception_score import inception_score


def test_confident_diverse_predictions_score_number_of_classes() -> None:
    """Each split of 5 images has each of 5 classes with certainty."""
    logits = 100 * torch.eye(5).repeat(4, 1)
    assert inception_score(logits, splits=4, seed=None) == (pytest.approx(5), pytest.approx(0))


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [100.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
def test_equal_images_score_1(row: list[float]) -> None:
    mean, deviation = inception_score(torch.tensor([row] * 12), splits=3)
    assert mean == pytest.approx(1)
    assert deviation == pytest.approx(0)


def test_two_kinds_of_images_match_closed_form() -> None:
    """With p = (q, 1 - q) or (1 - q, q), the score is 2 exp(-entropy(q))."""
    q = 0.9
    rows = torch.tensor([[q, 1 - q], [1 - q, q]]).log()
    entropy = -(q * math.log(q) + (1 - q) * math.log(1 - q))
    mean, _ = inception_score(rows.repeat(10, 1), splits=5, seed=None)
    assert mean == pytest.approx(2 * math.exp(-entropy))


def test_splits_are_consecutive_and_deviation_is_of_population() -> None:
    """7 images in 2 splits: 3 and 4. The first sees 1 class, the second 4."""
    logits = 100 * torch.eye(4)[[0, 0, 0, 0, 1, 2, 3]]
    assert inception_score(logits, splits=2, seed=None) == (pytest.approx(2.5), pytest.approx(1.5))


def test_seed_shuffles_with_numpy_permutation() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 3
    order = torch.from_numpy(np.random.RandomState(2020).permutation(50))
    assert inception_score(logits) == inception_score(logits[order], seed=None)
    assert inception_score(logits) != inception_score(logits, seed=1)


@pytest.mark.parametrize(("shape", "splits"), [((9, 4), 10), ((9, 4), 0), ((9,), 3)])
def test_wrong_input_raises(shape: tuple[int, ...], splits: int) -> None:
    with pytest.raises(ValueError, match=r"logits must be|splits need as many samples"):
        inception_score(torch.zeros(shape), splits=splits)
