"""Samples the same tokens in fewer passes than tokens, window by window: Jacobi iteration with fixed noise.

If the noise of every position is fixed, a token is a function of the tokens before it. So all tokens of a window can
be guessed and run in one pass, which samples each of them from the guesses before it:

```
guesses   3  7  7  1  5        input of a pass
sampled   3  7  2  9  4        output: 3 and 7 were right, so 2 follows right tokens and is final
          final    guesses     the next pass begins after it
```
Every pass makes at least one token final, so there are at most as many passes as tokens. The codes equal those of
sampling one token per pass, up to rounding: the logits of a window are summed in another order, which changes a token
if the two largest noisy logits differ by less than that. In float32 this happens at most about once in a hundred
thousand tokens. In half precision it is more likely, so equal codes are not guaranteed there.

Jacobi decoding: arXiv 2305.10427; of images: arXiv 2410.01699; with samples coupled by noise: arXiv 2510.24211.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dalle_zoo.sampling.noise import gumbel
from dalle_zoo.sampling.options import SamplingOptions
from dalle_zoo.sampling.progress import SAMPLE

# P prompts, n candidates of each, N image positions, W positions of a window, K codebook size

Read = Callable[[int, Tensor], Tensor]
"""First position of a window, and the token before each of its positions (P, n, W), to logits (P, n, W, K)."""

MAX_IMAGES = 4
"""Largest number of images at once. With more, slower passes outweigh fewer passes (benchmarks/jacobi.py)."""
DAMPING = 0.2
"""Weight of the previous pass in the logits that guesses are sampled from. Wrong guesses change from pass to pass, and
so do the guesses after them; damping makes them settle sooner, which saves 5 % of the passes with the bundled
weights."""


def sample_windows(
    read: Read,
    seeds: Tensor,
    options: SamplingOptions,
    given: Tensor,
    *,
    codebook_size: int,
    window: int,
    report: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Samples the tokens of n candidates for each of P prompts.

    A window begins at the first token that is not final for all candidates; candidates that are ahead keep their
    tokens.

    Args:
        read: Runs the prior over a window. A window begins after the last position whose previous tokens were all
            final when it was run.
        seeds: One seed per image, int64 (P, n).
        options: Temperature and filters; `read` has applied the guidance.
        given: Tokens that every candidate keeps, int64 (P, N), negative where to sample; they are run in windows too.
        codebook_size: Codebook size K.
        window: Largest number of positions W of a pass.
        report: Called after every pass with the number of tokens that are final for all candidates, and the final
            tokens, (P, n, N), with `SAMPLE` elsewhere.

    Returns:
        Tokens, int64 (P, n, N).
    """
    total = given.shape[1]
    steps = range(total)
    noise = torch.stack([gumbel(seeds.flatten(), step, codebook_size) for step in steps], 1)
    noise = noise.view(*seeds.shape, total, codebook_size)
    padded = torch.zeros(*seeds.shape, 1 + total, dtype=torch.long, device=seeds.device)
    tokens = padded[:, :, 1:]  # so `padded[:, :, i]` is the token before token i
    kept = (given >= 0)[:, None]
    tokens[:] = torch.where(kept, given[:, None], noise.argmax(-1))
    final = kept.cumprod(-1).sum(-1).expand_as(seeds)  # number of final tokens of each candidate
    positions = torch.arange(total, device=seeds.device)

    index, expected = 0, noise.new_empty(*seeds.shape, 0, codebook_size)
    while index < total:
        end = min(index + window, total)
        here, guesses = slice(index, end), tokens[:, :, index:end]
        logits = read(index, padded[:, :, here]).float()
        sampled = (options.filter(logits) + noise[:, :, here]).argmax(-1)
        sampled = torch.where((positions[here] < final[..., None]) | kept[:, :, here], guesses, sampled)
        num_right = (sampled == guesses).cumprod(-1).sum(-1)
        final = final.maximum((index + num_right + 1).clamp(max=end))

        expected = _damped(logits, expected)
        guessed = (options.filter(expected) + noise[:, :, here]).argmax(-1)
        tokens[:, :, here] = torch.where((positions[here] < final[..., None]) | kept[:, :, here], sampled, guessed)
        num_run = min(end, int(final.min()))
        expected = expected[:, :, num_run - index :]
        index = num_run
        if report is not None:
            report(index, torch.where((positions < final[..., None]) | kept, tokens, SAMPLE))
    return tokens


def _damped(logits: Tensor, before: Tensor) -> Tensor:
    """Interpolates logits of a window (P, n, W, K) with those of the previous pass for its first W' (P, n, W', K)."""
    overlap = before.shape[2]
    return torch.cat([logits[:, :, :overlap].lerp(before, DAMPING), logits[:, :, overlap:]], 2)
