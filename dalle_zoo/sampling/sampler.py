"""How one token is chosen from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_zoo.sampling.noise import gumbel

# B images, V vocabulary


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Temperature and filters; the defaults are the paper's plain sampling (section 2.6).

    Filters act on the image vocabulary alone and after the temperature; top-k first, then top-p.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Keep the k most likely tokens."""
    top_p: float | None = None
    """Keep the smallest set of most likely tokens whose probability reaches p."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number of at least 0, got {self.temperature}")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k must be a count of at least 1 (or absent to keep all), got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1] (or be absent to keep all), got {self.top_p}")

    def filter(self, logits: Tensor) -> Tensor:
        """Applies temperature and filters: logits (B, V) to logits with -inf where a token may not be sampled."""
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            # By index, not by value: exactly k tokens stay, also where several share the border's value.
            retained = logits.topk(self.top_k, dim=-1).indices
            logits = torch.full_like(logits, -math.inf).scatter(-1, retained, logits.gather(-1, retained))
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True, stable=True)
            mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            ordered = ordered.masked_fill(mass_before >= self.top_p, -math.inf)
            logits = torch.empty_like(logits).scatter(-1, order, ordered)
        return logits

    def sample(self, logits: Tensor, seeds: Tensor, step: int | Tensor) -> Tensor:
        """Generates one token per image by the Gumbel-max rule.

        Args:
            logits: Unfiltered, (B, V).
            seeds: Image seeds, int64 (B,).
            step: Number of the token within the image, as for `gumbel`.

        Returns:
            Tokens, int64 (B,).
        """
        noise = gumbel(seeds, step, logits.shape[-1])
        return noise.add_(self.filter(logits.float())).argmax(-1)
