"""CLIP score of known angles."""

from __future__ import annotations

import pytest
import torch
from dalle_zoo_eval.metrics.clip_score import clip_score as annotated


def clip_score(features: torch.Tensor, text_features: torch.Tensor) -> float:
    return annotated(features, text_features)["value"]


UP = torch.tensor([[0.0, 1.0]])


def directions(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.sin(), angles.cos()], 1) * torch.arange(1, len(degrees) + 1)[:, None]


def test_score_is_mean_cosine_times_100() -> None:
    """Features may have any length; there is no factor 2.5 as in Hessel et al."""
    assert clip_score(directions(0, 60, 90), UP.repeat(3, 1)) == pytest.approx(50, abs=1e-5)
    assert clip_score(7 * UP, UP) == pytest.approx(100)


def test_mean_is_clipped_instead_of_pairs() -> None:
    """As in torchmetrics, pairs with negative cosine lower the mean."""
    assert clip_score(directions(0, 120), UP.repeat(2, 1)) == pytest.approx(25, abs=1e-5)
    assert clip_score(directions(180, 120), UP.repeat(2, 1)) == 0


def test_wrong_input_raises() -> None:
    with pytest.raises(ValueError, match="with B of at least 1"):
        clip_score(UP, UP.repeat(2, 1))
    with pytest.raises(ValueError, match="with B of at least 1"):
        clip_score(UP[:0], UP[:0])
