"""Windows of guessed tokens give the codes of token-by-token sampling, in no more passes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_zoo.masks import MASKS
from dalle_zoo.models.prior import Prior
from dalle_zoo.sampling import SAMPLE, Progress, SamplingOptions, derive_seed, gumbel, sample_codes
from dalle_zoo.sampling.jacobi import sample_windows

Maker = Callable[..., Prior]

K = 7
"""Codebook of the small prior (tests/conftest.py)."""
TEXT = torch.tensor([[1, 2, 3, 4], [5, 11, 12, 13], [10, 11, 12, 13]])
SEEDS = torch.tensor([[derive_seed(p, n) for n in range(2)] for p in range(3)])
WINDOWS = (1, 3, 8, 1000)
every_mask = pytest.mark.parametrize("masks", [*MASKS, "paper(kernel=3)", "row, column"])


class Passes:
    """Records what it is called with."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def __call__(self, progress: Progress) -> None:
        self.done.append(progress.done)
        self.total = progress.total

    def report(self, done: int, tokens: Tensor) -> None:
        self.done.append(done)
        assert (tokens[..., :done] != SAMPLE).all()


def assert_equal_codes(prior: Prior, window: int, text: Tensor = TEXT, seeds: Tensor = SEEDS, **options: Any) -> int:
    """Compares with token-by-token sampling, and returns the number of passes."""
    expected, passes = sample_codes(prior, text, seeds, **options), Passes()
    came = sample_codes(prior, text, seeds, window=window, callback=passes, **options)
    assert torch.equal(came, expected)
    assert passes.done == sorted(set(passes.done)), "every pass makes at least one token final"
    assert passes.done[-1] == passes.total == expected[0, 0].numel()
    return len(passes.done)


# ------------------------------------------------------------ equal codes


@every_mask
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("grid", [(3, 4), (5, 3), (1, 7), (7, 1)], ids=str)
def test_windows_give_the_codes_of_single_tokens(
    random_prior: Maker, masks: str, window: int, grid: tuple[int, int]
) -> None:
    prior = random_prior(masks=masks, num_layers=4, image_height=grid[0], image_width=grid[1])
    passes = assert_equal_codes(prior, window)
    assert passes == grid[0] * grid[1] if window == 1 else passes <= grid[0] * grid[1]


@every_mask
@pytest.mark.parametrize(
    "options",
    [
        {"options": SamplingOptions(temperature=0.5)},
        {"options": SamplingOptions(temperature=0)},
        {"options": SamplingOptions(temperature=1.7, top_k=3)},
        {"options": SamplingOptions(top_p=0.6)},
        {"options": SamplingOptions(temperature=0.8, top_k=4, top_p=0.8, guidance_scale=1.5)},
        {"options": SamplingOptions(guidance_scale=3.0)},
        {"options": SamplingOptions(guidance_scale=0.0)},
    ],
    ids=str,
)
def test_windows_with_every_sampling_option(random_prior: Maker, masks: str, options: dict[str, Any]) -> None:
    prior = random_prior(masks=masks, num_layers=4)
    for window in (3, 1000):
        assert_equal_codes(prior, window, **options)


@every_mask
@pytest.mark.parametrize("count", [0, 1, 4, 7, 11, 12])
def test_windows_with_primed_tokens(random_prior: Maker, masks: str, count: int) -> None:
    prior = random_prior(masks=masks, num_layers=4)
    given = torch.randint(K, (3, 12), generator=torch.Generator().manual_seed(4))
    given[:, count:] = SAMPLE
    given = given.view(3, 3, 4)
    for window in WINDOWS:
        passes = assert_equal_codes(prior, window, options=SamplingOptions(guidance_scale=1.5), given=given)
        assert passes <= -(-count // window) + 12 - count, "given tokens are run a window at a time"


@every_mask
def test_given_tokens_may_be_anywhere(random_prior: Maker, masks: str) -> None:
    prior = random_prior(masks=masks, num_layers=4)
    generator = torch.Generator().manual_seed(5)
    given = torch.randint(K, (3, 3, 4), generator=generator)
    given[torch.rand(3, 3, 4, generator=generator) < 0.5] = SAMPLE
    for window in (3, 1000):
        assert_equal_codes(prior, window, options=SamplingOptions(guidance_scale=1.5), given=given)


@pytest.mark.parametrize(("prompts", "candidates"), [(1, 1), (1, 5), (3, 1), (2, 4)])
def test_windows_with_several_prompts_and_candidates(random_prior: Maker, prompts: int, candidates: int) -> None:
    prior = random_prior(masks="paper(kernel=3)", num_layers=4)
    seeds = torch.tensor([[derive_seed("many", p, n) for n in range(candidates)] for p in range(prompts)])
    assert_equal_codes(prior, 5, TEXT[:prompts], seeds)


def test_windows_on_a_larger_grid(random_prior: Maker) -> None:
    """The cache overwrites slots many times over, and the window moves by one token and by many."""
    prior = random_prior(masks="paper(kernel=5)", num_layers=4, image_height=9, image_width=11, codebook_size=50)
    for window in WINDOWS:
        assert_equal_codes(prior, window)


@pytest.mark.gpu
def test_windows_on_a_gpu(random_prior: Maker) -> None:
    prior = random_prior(masks="paper(kernel=3)", num_layers=4).cuda()
    assert_equal_codes(prior, 5, TEXT.cuda(), SEEDS.cuda(), options=SamplingOptions(guidance_scale=1.5))


# ------------------------------------------------------------ passes


def test_independent_tokens_take_one_pass_per_window(random_prior: Maker) -> None:
    prior = random_prior()
    with torch.no_grad():
        prior.image_head.weight.zero_()
    # The first pass samples every token of its window correctly, but only the next pass confirms the guesses.
    assert assert_equal_codes(prior, 1000, options=SamplingOptions(temperature=0)) <= 2
    assert assert_equal_codes(prior, 4, options=SamplingOptions(temperature=0)) <= 6


def chain(index: int, previous: Tensor) -> Tensor:
    """Logits of a model in which every token is the one before it plus 1, modulo 5, and the first is 0."""
    token = (previous + 1) % 5
    if index == 0:
        token[:, :, 0] = 0
    return 1000.0 * torch.nn.functional.one_hot(token, 5)


@pytest.mark.parametrize("window", WINDOWS)
def test_tokens_that_depend_on_the_one_before_take_one_pass_each(window: int) -> None:
    """The worst case: correct codes, and no more passes than tokens."""
    passes, seeds = Passes(), SEEDS[:1]
    tokens = sample_windows(
        chain,
        seeds,
        SamplingOptions(),
        seeds.new_full((1, 23), SAMPLE),
        codebook_size=5,
        window=window,
        report=passes.report,
    )
    assert torch.equal(tokens, (torch.arange(23) % 5).expand(1, 2, -1))
    assert len(passes.done) <= 23


def test_a_window_begins_after_the_slowest_candidate_and_others_retain_their_tokens() -> None:
    """The tokens of the first candidate depend only on its noise, those of the second on the token before."""
    seen = []

    def read(index: int, previous: Tensor) -> Tensor:
        seen.append((index, previous.clone()))
        logits = chain(index, previous)
        logits[:, 0] = 0
        return logits

    seeds = SEEDS[:1]
    empty = seeds.new_full((1, 12), SAMPLE)
    tokens = sample_windows(read, seeds, SamplingOptions(), empty, codebook_size=5, window=4)
    expected = torch.stack([gumbel(seeds[0, :1], step, 5)[0] for step in range(12)]).argmax(-1)
    assert torch.equal(tokens[0, 0], expected)
    assert torch.equal(tokens[0, 1], torch.arange(12) % 5)
    for (index, previous), (after, _) in pairwise(seen):
        assert index < after <= index + 4
        width = previous.shape[2]
        assert width == min(4, 12 - index)
        known = slice(max(1 - index, 0), None)
        assert torch.equal(previous[0, 0, known], expected[max(index - 1, 0) : index + width - 1])


# ------------------------------------------------------------ errors


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_below_1_raises(random_prior: Maker, window: int) -> None:
    with pytest.raises(ValueError, match=f"window must be at least 1.* got {window}"):
        sample_codes(random_prior(), TEXT, SEEDS, window=window)
