"""Sampling a token: temperature, filters, and the distribution of samples."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle_zoo.sampling import SamplingOptions

LOGITS = torch.tensor([[1.0, 3.0, -2.0, 0.5, 2.0], [0.0, -1.0, 4.0, 4.5, -3.0]])


def retained(options: SamplingOptions, logits: Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in options.filter(logits)]


def frequencies(options: SamplingOptions, logits: Tensor, count: int = 40_000) -> Tensor:
    tokens = options.sample(logits.expand(count, -1), torch.arange(count), step=3)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / count


def chi_square(options: SamplingOptions, logits: Tensor, law: Tensor, count: int = 40_000) -> float:
    seen, expected = frequencies(options, logits, count) * count, law * count
    assert not seen[law == 0].any(), "a filtered token was sampled"
    inside = law > 0
    return float(((seen - expected)[inside] ** 2 / expected[inside]).sum())


# The 1 - 1e-6 quantiles of chi-square by degrees of freedom.
LIMIT = {1: 23.9, 2: 27.6, 4: 33.4, 63: 134.0}


def test_samples_follow_the_softmax() -> None:
    assert chi_square(SamplingOptions(), LOGITS[0], LOGITS[0].softmax(-1)) < LIMIT[4]
    many = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert chi_square(SamplingOptions(), many, many.softmax(-1)) < LIMIT[63]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    options = SamplingOptions(temperature=temperature)
    assert chi_square(options, LOGITS[0], (LOGITS[0] / temperature).softmax(-1)) < LIMIT[4]


def test_filtered_samples_follow_the_renormalized_distribution() -> None:
    law = torch.tensor([0, 3.0, 0, 0, 2.0]).exp() * torch.tensor([0, 1, 0, 0, 1])
    assert chi_square(SamplingOptions(top_k=2), LOGITS[0], law / law.sum()) < LIMIT[1]
    law = LOGITS[0].exp() * torch.tensor([1, 1, 0, 0, 1])
    assert chi_square(SamplingOptions(top_p=0.9), LOGITS[0], law / law.sum()) < LIMIT[2]


def test_a_temperature_of_zero_selects_the_most_likely_token() -> None:
    options = SamplingOptions(temperature=0, top_k=3, top_p=0.5)
    for step in range(50):
        assert options.sample(LOGITS, torch.tensor([step, 7]), step).tolist() == [1, 3]


def test_samples_follow_the_gumbel_max_rule() -> None:
    from dalle_zoo.sampling import gumbel

    seeds = torch.tensor([3, 4])
    expected = (LOGITS / 0.7 + gumbel(seeds, 11, 5)).argmax(-1)
    assert torch.equal(SamplingOptions(temperature=0.7).sample(LOGITS, seeds, 11), expected)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
def test_top_k_is_a_count_of_image_tokens(count: int) -> None:
    order = [[1, 4, 0, 3, 2], [3, 2, 0, 1, 4]]
    assert retained(SamplingOptions(top_k=count), LOGITS) == [set(row[:count]) for row in order]
    finite = SamplingOptions(top_k=count).filter(LOGITS)
    assert torch.equal(finite[finite.isfinite()], LOGITS[finite.isfinite()]), "what is kept is unchanged"


@pytest.mark.parametrize("count", [1, 3, 100, 4096])
def test_top_k_keeps_exactly_k_of_equal_tokens(count: int) -> None:
    ties = torch.zeros(2, 8192)
    ties[1, 17] = 1
    filtered = SamplingOptions(top_k=count).filter(ties)
    assert filtered.isfinite().sum(-1).tolist() == [count, count]
    assert filtered[1, 17] == 1


def test_top_k_filters_a_vocabulary_of_the_papers_size() -> None:
    logits = torch.randn(3, 8192, generator=torch.Generator().manual_seed(0))
    filtered = SamplingOptions(top_k=1024).filter(logits)
    assert filtered.isfinite().sum(-1).tolist() == [1024] * 3
    for row in range(3):
        assert logits[row][filtered[row].isfinite()].min() > logits[row][~filtered[row].isfinite()].max()


@pytest.mark.parametrize("mass", [0.05, 0.3, 0.5, 0.75, 0.9, 0.999, 1.0])
def test_top_p_is_the_smallest_set_that_reaches_p(mass: float) -> None:
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(0)).double()
    for row, chosen in zip(logits, retained(SamplingOptions(top_p=mass), logits), strict=True):
        law = row.softmax(-1).tolist()
        best = sorted(range(30), key=lambda entry: -law[entry])
        assert chosen == set(best[: len(chosen)]), "the most likely ones"
        total = sum(law[entry] for entry in chosen)
        assert total >= mass - 1e-12
        assert len(chosen) == 1 or total - law[best[len(chosen) - 1]] < mass, "one fewer would not do"


def test_top_p_with_ties_and_at_the_threshold() -> None:
    half = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert retained(SamplingOptions(top_p=0.5), half) == [{0}]
    assert len(retained(SamplingOptions(top_p=0.7), half)[0]) == 2
    assert retained(SamplingOptions(top_p=1e-9), half) == [{0}], "one token always stays"


def test_filters_act_after_the_temperature_and_top_k_first() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert retained(SamplingOptions(top_p=0.7), logits) == [{0, 1}]
    assert retained(SamplingOptions(top_p=0.7, temperature=0.25), logits) == [{0}]
    assert retained(SamplingOptions(top_p=0.6, top_k=2), logits) == [{0}]  # 0.5 / 0.8 > 0.6


def test_rows_are_filtered_separately() -> None:
    both = SamplingOptions(top_p=0.8, top_k=3).filter(LOGITS)
    for row in range(2):
        assert torch.equal(SamplingOptions(top_p=0.8, top_k=3).filter(LOGITS[row : row + 1])[0], both[row])


@pytest.mark.parametrize(
    "options", [SamplingOptions(), SamplingOptions(temperature=0), SamplingOptions(top_k=2, top_p=0.5, temperature=2)]
)
def test_inputs_are_not_modified(options: SamplingOptions) -> None:
    logits, seeds = LOGITS.clone(), torch.tensor([1, 2])
    options.sample(logits, seeds, 0)
    assert torch.equal(logits, LOGITS)
    assert seeds.tolist() == [1, 2]


def test_half_precision_logits_are_sampled_in_float32() -> None:
    # In bfloat16 the noise would round to a few hundred values, and ties go to the first token.
    logits = torch.zeros(1, 512, dtype=torch.bfloat16)
    assert chi_square(SamplingOptions(top_p=0.999999), logits[0, :64], torch.full((64,), 1 / 64)) < LIMIT[63]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0, got -0.1"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": math.inf}, "temperature must be a finite number"),
        ({"guidance_scale": -1.0}, r"guidance_scale must be a finite number in 0\.\.1e\+06, got -1.0"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number"),
        ({"top_k": 0}, "top_k must be an integer of at least 1.* got 0"),
        ({"top_k": 0.5}, "top_k must be an integer of at least 1.* got 0.5"),
        ({"top_k": 3.0}, "top_k must be an integer of at least 1.* got 3.0"),
        ({"top_k": True}, "top_k must be an integer of at least 1.* got True"),
        ({"temperature": 1e-38}, "temperature must be at least 1e-06, or 0 for the most likely token, got 1e-38"),
        ({"temperature": "0.7"}, "temperature must be a finite number of at least 0, got '0.7'"),
        ({"temperature": True}, "temperature must be a finite number of at least 0, got True"),
        ({"temperature": None}, "temperature must be a finite number of at least 0, got None"),
        ({"guidance_scale": 1e30}, "guidance_scale must be a finite number in .* got 1e"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\].* got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
        ({"top_p": math.nan}, "top_p must be a finite number, got nan"),
    ],
)
def test_invalid_arguments_raise(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        SamplingOptions(**wrong)


def test_the_extreme_options_stay_finite() -> None:
    sharp = SamplingOptions(temperature=1e-6, top_k=4, top_p=0.9)
    assert sharp.sample(LOGITS, torch.tensor([3, 4]), 0).tolist() == [1, 3], "the most likely tokens"
    guided = SamplingOptions(guidance_scale=1e6).guide(torch.cat([LOGITS, -LOGITS]))
    assert guided.isfinite().all()


def test_numbers_of_numpy_become_plain_ones() -> None:
    options = SamplingOptions(temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.float64(0.25))
    assert options == SamplingOptions(temperature=0.5, top_k=3, top_p=0.25)
    assert json.loads(json.dumps(asdict(options)))["top_k"] == 3
