"""Samples code grids from any prior, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dalle_zoo.models.cpu.linears import with_packed_linears
from dalle_zoo.models.image_prior import ImagePrior
from dalle_zoo.sampling.capture import SampleFunction, repeated
from dalle_zoo.sampling.jacobi import sample_windows
from dalle_zoo.sampling.sampler import Sampler

# P prompts, n candidates of each, T text positions, N image positions, W positions of a window, K codebook size

Progress = Callable[[int, int], None]
"""Called after every pass, a token if not by windows, with the number of tokens done and the number in all."""


@torch.no_grad()
def decode_logits(prior: ImagePrior, text: Tensor, codes: Tensor) -> Iterator[Tensor]:
    """Logits of every image position by cached decoding of given codes: the twin of `ImagePrior.image_logits`.

    Args:
        prior: The prior.
        text: (P, T).
        codes: (P, n, h, w).

    Yields:
        (P, n, K) for positions 0 … N - 1.
    """
    decoder = with_packed_linears(prior, codes[..., 0, 0].numel()).decoding(text, codes.shape[1])
    tokens = codes.flatten(2)
    for index in range(tokens.shape[2]):
        yield decoder.step(index, tokens[:, :, index - 1] if index else None)


@torch.inference_mode()
def sample_codes(
    prior: ImagePrior,
    text: Tensor,
    seeds: Tensor,
    *,
    sampler: Sampler | None = None,
    prime: Tensor | None = None,
    guidance: float = 1.0,
    window: int | None = None,
    graph: bool = True,
    progress: Progress | None = None,
) -> Tensor:
    """Samples n code grids for each of P prompts.

    Args:
        prior: The prior.
        text: Text ids with padding ids, int64 (P, T).
        seeds: One seed per image, int64 (P, n); an image depends on its own seed alone.
        sampler: Temperature and filters. Defaults to plain sampling.
        prime: First tokens of every image in raster order, int64 (P, m) with m <= N, such as the top rows of a
            given image (section 3.3 of the paper).
        guidance: Classifier-free guidance g: logits = null + g * (conditional - null). 1 is none (the paper); other
            values need a prior that was trained with dropped captions.
        window: Samples windows of W tokens by guessing and checking (`sampling.jacobi`) instead of one token after the
            other: the same codes in fewer and wider passes, which pays for few images.
        graph: Whether a GPU repeats steps as a CUDA graph, where the prior allows it; windows it does not.
        progress: Called with (tokens done, tokens in all).

    Returns:
        Codes, int64 (P, n, h, w).

    Raises:
        ValueError: A shape, a given token, the guidance or the window does not fit, or the prior has no windows.
    """
    config = prior.config
    _check(prior, text, seeds, prime, guidance, window)
    sampler = sampler or Sampler()
    prompts, candidates = seeds.shape
    total = config.image_length
    prime = text.new_empty(prompts, 0) if prime is None else prime
    primed = prime.shape[1]
    guided = guidance != 1.0
    if guided:  # both branches in one batch, with caches of their own
        text = torch.cat([text, prior.null_text().expand(prompts, -1)])

    def both(previous: Tensor) -> Tensor:
        return torch.cat([previous, previous]) if guided else previous

    def combined(logits: Tensor) -> Tensor:
        if not guided:
            return logits
        conditional, null = logits.float().chunk(2)
        return null + guidance * (conditional - null)

    grid = (prompts, candidates, config.image_height, config.image_width)
    if not seeds.numel():
        return torch.empty(grid, dtype=torch.long, device=text.device)
    if window is not None:
        window = min(window, total)
        windows = with_packed_linears(prior, len(text) * candidates * window).window_decoding(text, candidates, window)
        tokens = sample_windows(
            lambda index, previous: combined(windows.window(index, both(previous))),
            seeds,
            sampler,
            prime,
            total=total,
            codebook_size=config.codebook_size,
            window=window,
            progress=progress,
        )
        return tokens.reshape(grid)
    decoder = with_packed_linears(prior, len(text) * candidates).decoding(text, candidates)

    def read(index: int | Tensor, previous: Tensor | None) -> Tensor:
        return combined(decoder.step(index, None if previous is None else both(previous)))

    step = _sample_function(read, sampler, seeds)
    tokens = torch.empty(prompts, candidates, total, dtype=torch.long, device=text.device)
    tokens[:, :, :primed] = prime[:, None]
    for index in range(total):
        previous = tokens[:, :, index - 1] if index else None
        if index < primed:  # nothing is sampled, but later tokens read it
            read(index, previous)
        else:
            if graph and text.is_cuda and previous is not None and index == max(primed, 1):
                step = repeated(step, decoder, index, previous)
            tokens[:, :, index] = step(index, previous)
        if progress is not None:
            progress(index + 1, total)
    return tokens.view(grid)


def _sample_function(read: SampleFunction, sampler: Sampler, seeds: Tensor) -> SampleFunction:
    """What reads a token's logits, (P, n, K), as what samples the token."""

    def sample(index: int | Tensor, previous: Tensor | None) -> Tensor:
        return sampler.sample(read(index, previous).flatten(0, 1), seeds.flatten(), index).view(seeds.shape)

    return sample


def _check(
    prior: ImagePrior, text: Tensor, seeds: Tensor, prime: Tensor | None, guidance: float, window: int | None
) -> None:
    config = prior.config
    if text.ndim != 2 or text.shape[1] != config.text_length:
        raise ValueError(f"text must have shape (P, {config.text_length}), got {tuple(text.shape)}")
    if seeds.ndim != 2 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be int64 of shape (P, n), got {seeds.dtype} {tuple(seeds.shape)}")
    if len(text) != len(seeds):
        raise ValueError(f"text and seeds must name the same prompts, got {len(text)} and {len(seeds)}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, got {guidance}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (or absent to sample one token after the other), got {window}")
    if prime is None:
        return
    if prime.ndim != 2 or len(prime) != len(text) or prime.shape[1] > config.image_length:
        expected = f"({len(text)}, m) with m <= {config.image_length}"
        raise ValueError(f"prime must have shape {expected}, got {tuple(prime.shape)}")
    if prime.numel() and (int(prime.min()) < 0 or int(prime.max()) >= config.codebook_size):
        raise ValueError(
            f"prime must hold codes in 0..{config.codebook_size - 1}, got {int(prime.min())}..{int(prime.max())}"
        )
