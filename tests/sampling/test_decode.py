"""Cached decoding equals the full forward pass, and an image depends only on its caption and seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_zoo.masks import MASKS, Mask, TextImageLayout
from dalle_zoo.models.cache import StepSlots
from dalle_zoo.models.decoding import PriorDecoding
from dalle_zoo.models.prior import Prior
from dalle_zoo.sampling import (
    SAMPLE,
    SamplingOptions,
    decode_logits,
    derive_seed,
    gumbel,
    sample_codes,
    token_log_likelihood,
)
from dalle_zoo.sampling.capture import RepeatedStep

Maker = Callable[..., Prior]

DECODING = {"atol": 1e-5, "rtol": 1e-4}
"""Float32 rounding over the layers: a step sums up in another order than the complete matrix does."""

SCHEDULES = [*MASKS, "conv(kernel=3)", "row, column", "paper", "paper(kernel=3)"]
every_schedule = pytest.mark.parametrize("masks", SCHEDULES)

V, K, T, H, W = 10, 7, 4, 3, 4
N = H * W
"""Sizes of the small prior (tests/conftest.py)."""

TEXT = torch.tensor([[1, 2, 3, 4], [5, 11, 12, 13], [10, 11, 12, 13]])
"""Three captions: a full one, one of a single token, an empty one."""


def make_seeds(prompts: int = 3, candidates: int = 2) -> Tensor:
    return torch.tensor([[derive_seed(p, n) for n in range(candidates)] for p in range(prompts)])


def first_tokens(prompts: int, count: int) -> Tensor:
    """Random tokens at the first ``count`` cells of each prompt; the others are to be sampled."""
    cells = torch.randint(K, (prompts, N), generator=torch.Generator().manual_seed(4))
    cells[:, count:] = SAMPLE
    return cells.view(prompts, H, W)


@torch.no_grad()
def full_logits(prior: Prior, text: Tensor, codes: Tensor) -> Tensor:
    """Image logits by the forward pass, (P, n, N, K)."""
    candidates = codes.shape[1]
    return prior(text.repeat_interleave(candidates, 0), codes.flatten(0, 1)).image.unflatten(0, (-1, candidates))


class Recorder(SamplingOptions):
    """Options that record the logits they are given."""

    def sample(self, logits: Tensor, seeds: Tensor, step: int | Tensor) -> Tensor:
        self.__dict__.setdefault("logits", {})[step] = logits.clone()
        return super().sample(logits, seeds, step)

    def seen(self, prompts: int, candidates: int) -> Tensor:
        """(P, n, steps, K)."""
        return torch.stack(list(self.__dict__["logits"].values()), 1).unflatten(0, (prompts, candidates))


# ------------------------------------------------------------ equality


@every_schedule
@pytest.mark.parametrize("grid", [(3, 4), (5, 2), (1, 6), (6, 1)], ids=str)
@pytest.mark.parametrize("candidates", [1, 3])
def test_cached_decoding_equals_the_full_forward(
    random_prior: Maker, masks: str, grid: tuple[int, int], candidates: int
) -> None:
    prior = random_prior(masks=masks, num_layers=4, image_height=grid[0], image_width=grid[1])
    codes = torch.randint(K, (3, candidates, *grid), generator=torch.Generator().manual_seed(0))
    came = torch.stack(list(decode_logits(prior, TEXT, codes)), 2)
    assert came.shape == (3, candidates, grid[0] * grid[1], K)
    torch.testing.assert_close(came, full_logits(prior, TEXT, codes), **DECODING)


@every_schedule
def test_sampled_tokens_are_those_of_the_full_forward(random_prior: Maker, masks: str) -> None:
    prior, seeds = random_prior(masks=masks, num_layers=4), make_seeds()
    codes = sample_codes(prior, TEXT, seeds)
    assert codes.shape == (3, 2, H, W)
    assert codes.dtype == torch.int64
    logits = full_logits(prior, TEXT, codes)
    for step in range(N):
        noisy = logits[:, :, step].flatten(0, 1) + gumbel(seeds.flatten(), step, K)
        assert torch.equal(noisy.argmax(-1), codes.flatten(2)[:, :, step].flatten()), f"step {step}"
    assert len(codes.flatten(0, 1).flatten(1).unique(dim=0)) == 6, "six different images"


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_the_back_end_does_not_change_the_images(random_prior: Maker, backend: str) -> None:
    expected = sample_codes(random_prior(masks="paper"), TEXT, make_seeds())
    assert torch.equal(sample_codes(random_prior(masks="paper", backend=backend), TEXT, make_seeds()), expected)


def test_decoded_logits_require_no_gradient(random_prior: Maker) -> None:
    first = next(decode_logits(random_prior(), TEXT, torch.zeros(3, 1, H, W, dtype=torch.long)))
    assert not first.requires_grad


# ------------------------------------------------------------ caches


@pytest.mark.parametrize(
    ("masks", "slots"),
    [("row", 5), ("full", 12), ("column", 9), ("conv(kernel=3)", 8)],
    # A row mask attends to the 4 cells before and to itself; offsets of the convolution reach 2 * 4 - 1.
)
def test_a_cache_retains_keys_until_their_last_read(random_prior: Maker, masks: str, slots: int) -> None:
    decoder = PriorDecoding(random_prior(masks=masks), TEXT, 5)
    for cache in decoder.caches:
        assert cache.key.shape == cache.value.shape == (3, 2, 5, slots, 8)
        assert cache.text_key.shape == cache.text_value.shape == (6, T, 8), "once per prompt, not once per candidate"
        assert cache.num_bytes == 2 * 4 * 3 * 2 * 5 * slots * 8


def test_a_row_layer_of_the_papers_grid_holds_33_keys(random_prior: Maker) -> None:
    prior = random_prior(masks="row", image_height=32, image_width=32, num_layers=1)
    (cache,) = PriorDecoding(prior, TEXT[:1], 1).caches
    assert cache.value.shape[-2] == 33


@pytest.mark.parametrize("masks", ["row", "column"])
def test_a_step_reads_no_slot_that_its_mask_forbids(random_prior: Maker, masks: str) -> None:
    prior = random_prior(masks=masks, num_layers=1)
    decoder = PriorDecoding(prior, TEXT, 2)
    cache, dense = decoder.caches[0], prior.masks[0].dense()[T:, T:]
    codes = torch.randint(K, (3, 2, N), generator=torch.Generator().manual_seed(0))
    plan = cache.slots.plan
    with torch.no_grad():
        for step in range(N):
            slots = cache.slots.at(step)
            reads = torch.arange(plan.num_slots)[slots.read]
            count = len(reads) if slots.bias is None else int((slots.bias == 0).sum())
            assert count == int(dense[step].sum())
            # Slots that the step does not read are filled with NaN.
            idle = torch.ones(plan.num_slots, dtype=torch.bool).index_fill(0, reads, False)
            retained = cache.key[:, :, :, idle], cache.value[:, :, :, idle]
            cache.key[:, :, :, idle], cache.value[:, :, :, idle] = torch.nan, torch.nan
            assert decoder.step(step, codes[:, :, step - 1] if step else None).isfinite().all()
            cache.key[:, :, :, idle], cache.value[:, :, :, idle] = retained


@pytest.mark.parametrize(("masks", "gathered"), [("row", 0), ("full", 0), ("column", 29), ("conv", 15)])
def test_slots_that_a_step_reads_are_mostly_contiguous(masks: str, gathered: int) -> None:
    """Exceptions are steps in the last row of a column mask, whose keys reuse the slots of other columns."""
    mask = Mask.from_spec(masks, TextImageLayout(text=1, height=32, width=32))
    slots = StepSlots(mask, 1, torch.device("cpu"), torch.float32)
    reads = [slots.at(step).read for step in range(32 * 32)]
    assert sum(not isinstance(read, slice) for read in reads) == gathered
    needed = int(mask.decode_table().valid.sum())
    touched = sum(read.stop - read.start if isinstance(read, slice) else len(read) for read in reads)
    assert touched <= (1.01 if masks != "conv" else 2.7) * needed


# ------------------------------------------------------------ step index on the device


@every_schedule
def test_a_step_index_on_the_device_gives_the_same_logits(random_prior: Maker, masks: str) -> None:
    prior = random_prior(masks=masks, num_layers=4)
    codes = torch.randint(K, (3, 2, N), generator=torch.Generator().manual_seed(0))
    by_host, by_device = PriorDecoding(prior, TEXT, 2), PriorDecoding(prior, TEXT, 2)
    with torch.no_grad():
        torch.testing.assert_close(by_device.step(0, None), by_host.step(0, None))
        for index in range(1, N):
            expected = by_host.step(index, codes[:, :, index - 1])
            came = by_device.step(torch.tensor([index]), codes[:, :, index - 1])
            torch.testing.assert_close(came, expected, **DECODING)


def test_a_repeated_step_gives_the_same_sample(random_prior: Maker) -> None:
    prior, seeds, options = (
        random_prior(masks="paper", num_layers=3),
        make_seeds(),
        SamplingOptions(top_k=5, top_p=0.9),
    )
    expected = sample_codes(prior, TEXT, seeds, options).flatten(2)
    decoder = PriorDecoding(prior, TEXT, 2)

    def sample(index: int | Tensor, previous: Tensor | None) -> Tensor:
        return options.sample(decoder.step(index, previous).flatten(0, 1), seeds.flatten(), index).view(3, 2)

    with torch.no_grad():
        tokens = [sample(0, None)]
        step = RepeatedStep(sample, 1, tokens[0], capture=False)
        for index in range(1, N):
            tokens.append(step(index, tokens[-1]))
    assert torch.equal(torch.stack(tokens, 2), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("primed", [0, 5])
@every_schedule
def test_a_graph_samples_what_single_launches_sample(
    random_prior: Maker, masks: str, primed: int, guidance_scale: float
) -> None:
    prior = random_prior(masks=masks, num_layers=4).cuda()
    text, seeds = TEXT.cuda(), make_seeds().cuda()
    given = first_tokens(3, primed).cuda()
    by_graph, by_launch = (
        sample_codes(prior, text, seeds, SamplingOptions(guidance_scale=guidance_scale), given=given, graph=graph)
        for graph in (True, False)
    )
    assert torch.equal(by_graph, by_launch)


# ------------------------------------------------------------ windows


@every_schedule
@pytest.mark.parametrize("grid", [(3, 4), (6, 2), (1, 6)], ids=str)
@pytest.mark.parametrize("window", [2, 3, 5])
def test_windows_equal_the_full_forward(random_prior: Maker, masks: str, grid: tuple[int, int], window: int) -> None:
    """Wrong guesses are run and then overwritten, in windows of varying length."""
    prior = random_prior(masks=masks, num_layers=4, image_height=grid[0], image_width=grid[1])
    generator, total = torch.Generator().manual_seed(0), grid[0] * grid[1]
    codes = torch.randint(K, (3, 2, *grid), generator=generator)
    expected, tokens = full_logits(prior, TEXT, codes), codes.flatten(2)
    decoder, index = PriorDecoding(prior, TEXT, 2, window), 0
    with torch.no_grad():
        while index < total:
            count = min(window, total - index)
            right = int(torch.randint(1, count + 1, (), generator=generator))
            previous = torch.randint(K, (3, 2, count), generator=generator)
            known = slice(max(index - 1, 0), index + right - 1)
            previous[:, :, max(1 - index, 0) : right] = tokens[:, :, known]
            came = decoder.window(index, previous)
            torch.testing.assert_close(came[:, :, :right], expected[:, :, index : index + right], **DECODING)
            index += right


# ------------------------------------------------------------ guidance


def test_guidance_acts_at_every_step_and_changes_no_input(random_prior: Maker) -> None:
    prior, seeds, text = random_prior(masks="paper", num_layers=3), make_seeds(), TEXT.clone()
    recorder = Recorder(guidance_scale=2.5)
    codes = sample_codes(prior, text, seeds, recorder)
    assert torch.equal(text, TEXT)
    assert torch.equal(seeds, make_seeds())
    conditional = full_logits(prior, TEXT, codes)
    null = full_logits(prior, prior.null_text().expand(3, -1), codes)
    guided = recorder.seen(3, 2)
    torch.testing.assert_close(guided, null + 2.5 * (conditional - null), **DECODING)
    difference = (guided - conditional).abs().amax(-1)
    assert (difference[:2] > 1e-3).all(), "at every step of every image that has a caption"
    torch.testing.assert_close(guided[2], null[2], **DECODING)  # the empty caption is its own null


def test_guidance_of_1_has_no_effect_and_of_0_ignores_the_caption(random_prior: Maker) -> None:
    prior, seeds = random_prior(), make_seeds()
    plain = sample_codes(prior, TEXT, seeds)
    assert torch.equal(sample_codes(prior, TEXT, seeds, SamplingOptions(guidance_scale=1.0)), plain)
    null = sample_codes(prior, prior.null_text().expand(3, -1), seeds)
    assert torch.equal(sample_codes(prior, TEXT, seeds, SamplingOptions(guidance_scale=0.0)), null)
    assert not torch.equal(null, plain)


# ------------------------------------------------------------ seeds


def test_an_image_depends_only_on_its_caption_and_seed(random_prior: Maker) -> None:
    prior, seeds = random_prior(masks="paper", num_layers=3), make_seeds(3, 4)
    together = sample_codes(prior, TEXT, seeds)
    for p in range(3):
        alone = sample_codes(prior, TEXT[p : p + 1], seeds[p : p + 1])
        assert torch.equal(alone[0], together[p])
        halves = [sample_codes(prior, TEXT[p : p + 1], seeds[p : p + 1, at]) for at in (slice(0, 1), slice(1, 4))]
        assert torch.equal(torch.cat(halves, 1)[0], together[p])
    turned = sample_codes(prior, TEXT.flip(0), seeds.flip(0, 1))
    assert torch.equal(turned.flip(0, 1), together)
    as_rows = sample_codes(prior, TEXT.repeat_interleave(4, 0), seeds.view(12, 1))
    assert torch.equal(as_rows.view_as(together), together)


def test_the_global_generator_is_not_used(random_prior: Maker) -> None:
    prior, state = random_prior(), torch.random.get_rng_state()
    first = sample_codes(prior, TEXT, make_seeds())
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(sample_codes(prior, TEXT, make_seeds()), first)
    assert not torch.equal(sample_codes(prior, TEXT, make_seeds() + 1), first)


def test_greedy_images_do_not_depend_on_the_seed(random_prior: Maker) -> None:
    prior, greedy = random_prior(), SamplingOptions(temperature=0)
    codes = sample_codes(prior, TEXT, make_seeds(), greedy)
    assert torch.equal(codes[:, 0], codes[:, 1])
    best = full_logits(prior, TEXT, codes).argmax(-1)
    assert torch.equal(best.view_as(codes), codes)


def test_top_k_leaves_k_tokens_at_every_step(random_prior: Maker) -> None:
    prior = random_prior()
    codes = sample_codes(prior, TEXT, make_seeds(3, 16), SamplingOptions(top_k=2))
    best = full_logits(prior, TEXT, codes).topk(2).indices
    assert (best == codes.flatten(2)[..., None]).any(-1).all()


# ------------------------------------------------------------ priming


@pytest.mark.parametrize("count", [0, 1, 4, 7, 12])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_primed_tokens_are_unchanged_and_the_rest_is_sampled(
    random_prior: Maker, count: int, guidance_scale: float
) -> None:
    prior, seeds = random_prior(), make_seeds(3, 5)
    given = first_tokens(3, count)
    recorder = Recorder(guidance_scale=guidance_scale)
    codes = sample_codes(prior, TEXT, seeds, recorder, given=given).flatten(2)
    assert torch.equal(codes[:, :, :count], given.flatten(1)[:, None, :count].expand(-1, 5, -1))
    if count == N:
        return
    assert len(codes[0, :, count:].unique(dim=0)) == 5, "every candidate goes its own way"
    seen = recorder.seen(3, 5)
    assert seen.shape[2] == N - count, "nothing is sampled where a token is given"
    if guidance_scale == 1:
        logits = full_logits(prior, TEXT, codes.unflatten(2, (H, W)))
        torch.testing.assert_close(seen, logits[:, :, count:], **DECODING)


def test_priming_with_an_image_continues_it(random_prior: Maker) -> None:
    prior, seeds = random_prior(), make_seeds()
    sampled = sample_codes(prior, TEXT, seeds)
    for p in range(3):
        given = sampled[p, :1].clone()
        given[:, 1:] = SAMPLE
        again = sample_codes(prior, TEXT[p : p + 1], seeds[p : p + 1, :1], given=given)
        assert torch.equal(again[0, 0], sampled[p, 0])


@pytest.mark.parametrize("window", [None, 3])
def test_any_region_is_kept(random_prior: Maker, window: int | None) -> None:
    prior, seeds = random_prior(), make_seeds(3, 2)
    free = sample_codes(prior, TEXT, seeds)
    given = torch.full((3, H, W), SAMPLE)
    given[0, 1, :2] = (free[0, 0, 1, :2] + 1) % K  # other cells for each prompt
    given[1, 0, 1:] = given[1, 2] = 3
    codes = sample_codes(prior, TEXT, seeds, given=given, window=window)
    kept = (given != SAMPLE)[:, None].expand_as(codes)
    assert torch.equal(codes[kept], given[:, None].expand_as(codes)[kept])
    assert torch.equal(codes[2], free[2]), "a prompt without given cells is sampled as before"
    assert torch.equal(codes[0, :, 0], free[0, :, 0]), "cells before a given one are sampled as before"
    assert not torch.equal(codes[0, 0], free[0, 0])
    logits = full_logits(prior, TEXT, codes)
    noise = torch.stack([gumbel(seeds.flatten(), step, K) for step in range(N)], 1).view(logits.shape)
    sampled = (logits + noise).argmax(-1).view(codes.shape)
    assert torch.equal(sampled[~kept], codes[~kept]), "sampled cells follow the given cells before them"


def test_the_likelihood_of_tokens(random_prior: Maker) -> None:
    prior = random_prior()
    codes = sample_codes(prior, TEXT, make_seeds())
    expected = full_logits(prior, TEXT, codes).log_softmax(-1)
    flat = codes.flatten(0, 1)
    likelihood = token_log_likelihood(prior, TEXT.repeat_interleave(2, 0), flat, batch_size=4)
    torch.testing.assert_close(likelihood, expected.gather(-1, codes.flatten(2)[..., None]).view(flat.shape))
    with pytest.raises(ValueError, match="the same batch size, got 3 and 6"):
        token_log_likelihood(prior, TEXT, flat)


# ------------------------------------------------------------ the rest


def test_progress_counts_tokens(random_prior: Maker) -> None:
    calls: list[tuple[int, int]] = []
    sample_codes(random_prior(), TEXT, make_seeds(), callback=lambda it: calls.append((it.done, it.total)))
    assert calls == [(done, N) for done in range(1, N + 1)]


def test_sampling_in_bfloat16(random_prior: Maker) -> None:
    codes = sample_codes(random_prior().to(torch.bfloat16), TEXT, make_seeds(), SamplingOptions(guidance_scale=2.0))
    assert codes.shape == (3, 2, H, W)
    assert codes.min() >= 0
    assert codes.max() < K


def test_training_continues_after_sampling(random_prior: Maker) -> None:
    prior = random_prior(masks="conv(kernel=5)").train()
    codes = sample_codes(prior, TEXT, make_seeds())
    assert prior.training
    prior.loss(TEXT, codes[:, 0].clone()).total.backward()
    assert all(parameter.grad is not None for parameter in prior.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"text": TEXT[:2]}, "text and seeds must have the same number of prompts, got 2 and 3"),
        ({"text": TEXT[:, :3]}, r"text must have shape \(P, 4\), got \(3, 3\)"),
        ({"text": TEXT[0]}, r"text must have shape \(P, 4\), got \(4,\)"),
        ({"seeds": make_seeds()[0]}, r"seeds must be int64 of shape \(P, n\), got torch.int64 \(2,\)"),
        ({"seeds": make_seeds().double()}, r"seeds must be int64 of shape \(P, n\), got torch.float64"),
        (
            {"given": torch.zeros(3, 12, dtype=torch.long)},
            r"given must be int64 of shape \(3, 3, 4\), got torch.int64 \(3, 12\)",
        ),
        ({"given": torch.zeros(3, H, W)}, r"given must be int64 of shape \(3, 3, 4\), got torch.float32"),
        ({"given": torch.full((3, H, W), K)}, r"given must hold codes in 0\.\.6, or -1 where to sample, got 7\.\.7"),
        ({"given": torch.full((3, H, W), -2)}, r"given must hold codes in 0\.\.6, or -1 where to sample, got -2"),
    ],
)
def test_invalid_arguments_raise(random_prior: Maker, wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"text": TEXT, "seeds": make_seeds()} | wrong
    with pytest.raises(ValueError, match=message):
        sample_codes(random_prior(), **arguments)


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)])
@pytest.mark.parametrize("window", [None, 2])
def test_zero_prompts_or_candidates_give_empty_codes(
    random_prior: Maker, shape: tuple[int, int], window: int | None
) -> None:
    seeds = torch.zeros(shape, dtype=torch.long)
    assert sample_codes(random_prior(), TEXT[: shape[0]], seeds, window=window).shape == (*shape, H, W)
