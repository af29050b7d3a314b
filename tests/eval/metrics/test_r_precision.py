"""R-precision of features with known order."""

from __future__ import annotations

import pytest
import torch
from dalle_zoo_eval.metrics.r_precision import r_precision

N = 120
KEYS = [f"image {i}" for i in range(N)]


def test_matching_features_score_1() -> None:
    features = torch.eye(N) + 0.1
    assert r_precision(3 * features, features, KEYS) == (1, 0)
    assert r_precision(features.roll(1, 0), features, KEYS)[0] < 0.2


def test_splits_are_consecutive() -> None:
    """The first half of the images matches its captions, the second half is opposite to them."""
    text = torch.eye(N)
    image = text.clone()
    image[N // 2 :] *= -1
    assert r_precision(image, text, KEYS, splits=2) == (0.5, 0.5)
    assert r_precision(image, text, KEYS, splits=1) == (0.5, 0)


def test_noise_scores_chance_level() -> None:
    random = torch.Generator().manual_seed(0)
    image, text = (torch.randn(2000, 16, generator=random) for _ in range(2))
    mean, deviation = r_precision(image, text, [str(i) for i in range(2000)], mismatched=9)
    assert mean == pytest.approx(0.1, abs=0.03)
    assert 0 < deviation < 0.05


def test_equal_captions_score_chance_level() -> None:
    same = torch.ones(N, 4)
    assert r_precision(same, same, KEYS)[0] == pytest.approx(1 / 100)


def test_mismatched_captions_have_other_concepts() -> None:
    """Captions of a class are equal, so a sampled caption of the own class would tie."""
    groups = [str(i % 4) for i in range(N)]
    features = torch.eye(4)[[i % 4 for i in range(N)]]
    assert r_precision(features, features, groups, mismatched=90) == (1, 0)
    with pytest.raises(ValueError, match=r"91 captions of other concepts .* '0' leaves 90"):
        r_precision(features, features, groups, mismatched=91)


def test_score_depends_only_on_seed() -> None:
    random = torch.Generator().manual_seed(0)
    image = torch.randn(N, 8, generator=random)
    text = image + torch.randn(N, 8, generator=random)
    first = r_precision(image, text, KEYS, mismatched=20)
    assert first == r_precision(image, text, KEYS, mismatched=20)
    assert first != r_precision(image, text, KEYS, mismatched=20, seed=1)


def test_wrong_input_raises() -> None:
    features = torch.eye(N)
    with pytest.raises(ValueError, match="one concept per row"):
        r_precision(features, features, KEYS[:-1])
    with pytest.raises(ValueError, match=r"splits must be in 1\.\.120"):
        r_precision(features, features, KEYS, splits=121)
    with pytest.raises(ValueError, match="120 captions"):
        r_precision(features, features, KEYS, mismatched=120)
