"""Samples code grids from any prior, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dalle_zoo.models.cpu.linears import packed_linears
from dalle_zoo.models.image_prior import ImagePrior
from dalle_zoo.sampling.capture import SampleFunction, repeated
from dalle_zoo.sampling.jacobi import sample_windows
from dalle_zoo.sampling.options import SamplingOptions
from dalle_zoo.sampling.progress import SAMPLE, Callback, Progress

# P prompts, n candidates of each, T text positions, N image positions, W positions of a window, K codebook size


@torch.no_grad()
def decode_logits(prior: ImagePrior, text: Tensor, codes: Tensor) -> Iterator[Tensor]:
    """Logits of every image position by cached decoding of given codes: the twin of `ImagePrior.image_logits`.

    Args:
        prior: The prior.
        text: Text ids, int64 (P, T).
        codes: Image tokens, int64 (P, n, h, w).

    Yields:
        Logits (P, n, K) of positions 0 … N - 1.

    Example:
        >>> from dalle_zoo.models.prior import Prior, PriorConfig
        >>> shape = dict(text_length=4, text_vocab=8, image_height=2, image_width=2, codebook_size=16)
        >>> prior = Prior(PriorConfig(**shape, width=8, num_layers=1, num_heads=1, masks="row"))
        >>> text, codes = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 1, 2, 2, dtype=torch.long)
        >>> steps = torch.stack([*decode_logits(prior, text, codes)], dim=2)
        >>> torch.allclose(steps[:, 0], prior.image_logits(text, codes[:, 0]), atol=1e-5)
        True
    """
    tokens = codes.flatten(2)
    with packed_linears(prior, codes[..., 0, 0].numel()):
        decoder = prior.decoding(text, codes.shape[1])
        for index in range(tokens.shape[2]):
            yield decoder.step(index, tokens[:, :, index - 1] if index else None)


@torch.inference_mode()
def sample_codes(
    prior: ImagePrior,
    text: Tensor,
    seeds: Tensor,
    options: SamplingOptions | None = None,
    *,
    given: Tensor | None = None,
    negative: Tensor | None = None,
    window: int | None = None,
    graph: bool = True,
    callback: Callback | None = None,
) -> Tensor:
    """Samples n code grids for each of P prompts.

    Args:
        prior: The prior.
        text: Text ids with padding ids, int64 (P, T).
        seeds: One seed per image, int64 (P, n); an image depends only on its own seed.
        options: Temperature, filters and guidance. Defaults to plain sampling.
        given: Codes that every candidate of a prompt keeps, int64 (P, h, w), with `SAMPLE` (-1) at the cells to
            sample: the top rows of an image (section 3.3 of the paper), or any region. Cells are sampled in raster
            order, so a sampled cell depends on the kept cells before it, not on those after it. Defaults to none.
        negative: Text ids that guidance leads away from, int64 (P, T). Defaults to the empty caption.
        window: Number W of tokens that each pass guesses and checks (`sampling.jacobi`): the same codes in fewer and
            wider passes, which is faster for few images. Defaults to one token per pass.
        graph: Whether a GPU replays steps as a CUDA graph, if the prior supports it; windows never do.
        callback: Called after every pass, see `Progress`. Defaults to none.

    Returns:
        Codes, int64 (P, n, h, w).

    Raises:
        ValueError: A shape, a given token or the window does not fit, or the prior supports no windows or no guidance.

    Example:
        >>> from dalle_zoo.models.prior import Prior, PriorConfig
        >>> shape = dict(text_length=4, text_vocab=8, image_height=2, image_width=2, codebook_size=16)
        >>> prior = Prior(PriorConfig(**shape, width=8, num_layers=1, num_heads=1, masks="row"))
        >>> text, seeds = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 1, 0]])
        >>> codes = sample_codes(prior, text, seeds)
        >>> codes.shape, torch.equal(codes[:, 0], codes[:, 2])  # equal seeds
        (torch.Size([1, 3, 2, 2]), True)
    """
    _check(prior, text, seeds, given, window)
    if negative is not None and negative.shape != text.shape:
        raise ValueError(f"negative must have the shape of text, {tuple(text.shape)}, got {tuple(negative.shape)}")
    options = options or SamplingOptions()
    config = prior.config
    grid = (*seeds.shape, config.image_height, config.image_width)
    if not seeds.numel():
        return torch.empty(grid, dtype=torch.long, device=text.device)
    cells = text.new_full((len(text), config.image_length), SAMPLE) if given is None else given.flatten(1)
    if options.guided:  # conditional and null branch in one batch, each with its own cache
        text = torch.cat([text, prior.null_text().expand(len(text), -1) if negative is None else negative])
    window = window and min(window, config.image_length)
    with packed_linears(prior, len(text) * seeds.shape[1] * (window or 1)):
        if window is None:
            tokens = _sample_steps(prior, text, seeds, options, cells, graph, callback)
        else:
            tokens = _sample_windows(prior, text, seeds, options, cells, window, callback)
    return tokens.reshape(grid)


def _both(previous: Tensor, options: SamplingOptions) -> Tensor:
    """Previous tokens of the conditional and the null branch, (P, …) to (2 P, …) if guided."""
    return torch.cat([previous, previous]) if options.guided else previous


def _sample_steps(
    prior: ImagePrior,
    text: Tensor,
    seeds: Tensor,
    options: SamplingOptions,
    given: Tensor,
    graph: bool,
    callback: Callback | None,
) -> Tensor:
    """Samples one token per pass, except the given ones, (P, N): tokens (P, n, N)."""
    candidates, total = seeds.shape[1], prior.config.image_length
    grid = (*seeds.shape, prior.config.image_height, prior.config.image_width)
    decoder = prior.decoding(text, candidates)

    def logits(index: int | Tensor, previous: Tensor | None) -> Tensor:
        return options.guide(decoder.step(index, None if previous is None else _both(previous, options)))

    def sample(index: int | Tensor, previous: Tensor | None) -> Tensor:
        flat = logits(index, previous).flatten(0, 1)
        return options.sample(flat, seeds.flatten(), index).view(seeds.shape)

    step: SampleFunction = sample
    recorded = not (graph and text.is_cuda)
    tokens = given[:, None].repeat(1, candidates, 1)
    sampled = given == SAMPLE
    all_given = (~sampled.any(0)).tolist()  # read once, so that no step waits for the device
    for index in range(total):
        previous = tokens[:, :, index - 1] if index else None
        if all_given[index]:  # nothing is sampled, but the cache needs the keys and values of the given tokens
            logits(index, previous)
        else:
            if not recorded and previous is not None:
                step, recorded = repeated(sample, decoder, index, previous), True
            here = tokens[:, :, index]
            tokens[:, :, index] = torch.where(sampled[:, index, None], step(index, previous), here)
        if callback is not None:
            callback(Progress(index + 1, total, lambda: tokens.reshape(grid).clone()))
    return tokens


def _sample_windows(
    prior: ImagePrior,
    text: Tensor,
    seeds: Tensor,
    options: SamplingOptions,
    given: Tensor,
    window: int,
    callback: Callback | None,
) -> Tensor:
    """Samples by guessing and checking ``window`` tokens per pass: tokens (P, n, N)."""
    candidates = seeds.shape[1]
    decoder = prior.window_decoding(text, candidates, window)
    grid = (*seeds.shape, prior.config.image_height, prior.config.image_width)

    def report(done: int, tokens: Tensor) -> None:
        assert callback is not None
        callback(Progress(done, prior.config.image_length, lambda: tokens.reshape(grid).clone()))

    return sample_windows(
        lambda index, previous: options.guide(decoder.window(index, _both(previous, options))),
        seeds,
        options,
        given,
        codebook_size=prior.config.codebook_size,
        window=window,
        report=None if callback is None else report,
    )


def _check(prior: ImagePrior, text: Tensor, seeds: Tensor, given: Tensor | None, window: int | None) -> None:
    config = prior.config
    if text.ndim != 2 or text.shape[1] != config.text_length:
        raise ValueError(f"text must have shape (P, {config.text_length}), got {tuple(text.shape)}")
    if seeds.ndim != 2 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be int64 of shape (P, n), got {seeds.dtype} {tuple(seeds.shape)}")
    if len(text) != len(seeds):
        raise ValueError(f"text and seeds must have the same number of prompts, got {len(text)} and {len(seeds)}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None to sample one token per pass, got {window}")
    if given is not None:
        check_given(config, given, len(text))


def check_given(config: Any, given: Tensor, prompts: int) -> None:
    """Raises `ValueError` unless codes that are kept fit a prior.

    Args:
        config: Configuration of the prior.
        given: Codes, int64 (P, h, w), with `SAMPLE` at the cells to sample.
        prompts: Number of prompts P.

    Example:
        >>> from dalle_zoo.models.prior import PriorConfig
        >>> config = PriorConfig(image_height=2, image_width=2, codebook_size=16, masks="row")
        >>> check_given(config, torch.tensor([[[5, 15], [SAMPLE, SAMPLE]]]), prompts=1)  # keeps the top row
        >>> check_given(config, torch.tensor([[[5, 16], [SAMPLE, SAMPLE]]]), prompts=1)
        Traceback (most recent call last):
        ValueError: given must hold codes in 0..15, or -1 where to sample, got -1..16
    """
    grid = (prompts, config.image_height, config.image_width)
    if given.shape != grid or given.dtype != torch.int64:
        raise ValueError(f"given must be int64 of shape {grid}, got {given.dtype} {tuple(given.shape)}")
    if given.numel() and (int(given.min()) < SAMPLE or int(given.max()) >= config.codebook_size):
        raise ValueError(
            f"given must hold codes in 0..{config.codebook_size - 1}, or {SAMPLE} where to sample, "
            f"got {int(given.min())}..{int(given.max())}"
        )
