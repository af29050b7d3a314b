"""How tokens are sampled from logits: temperature, filters, and classifier-free guidance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_zoo.sampling.noise import gumbel
from dalle_zoo.values import as_integer, as_number

LARGEST_FACTOR = 1e6
"""Largest factor of logits, by the guidance scale or by 1 / temperature: their products stay finite in float32."""

# B images, V vocabulary


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model is sampled where a call does not say: its folder has them in ``generation_config.json``.

    The file is named as in transformers. It has only these two: a model needs them to give its best images, while the
    filters are a choice of the call.

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is out of range.

    Example:
        >>> SamplingDefaults(temperature=0.4, guidance_scale=1.5).options(guidance_scale=1, top_k=8)
        SamplingOptions(temperature=0.4, top_k=8, top_p=None, guidance_scale=1.0)
    """

    temperature: float = 1.0
    """Divides the logits. Defaults to 1, as in the paper."""
    guidance_scale: float = 1.0
    """Classifier-free guidance. Defaults to 1, no guidance, as in the paper."""

    def __post_init__(self) -> None:
        checked = self.options()
        for name in ("temperature", "guidance_scale"):
            object.__setattr__(self, name, getattr(checked, name))

    def options(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
    ) -> SamplingOptions:
        """Returns the options of a call.

        Args:
            temperature: As in `SamplingOptions`. Defaults to the model's.
            top_k: As in `SamplingOptions`.
            top_p: As in `SamplingOptions`.
            guidance_scale: As in `SamplingOptions`. Defaults to the model's.
        """
        return SamplingOptions(
            temperature=self.temperature if temperature is None else temperature,
            top_k=top_k,
            top_p=top_p,
            guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
        )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Distribution that tokens are sampled from. The defaults are the paper's plain sampling (section 2.6).

    The temperature is applied first, then top-k, then top-p. Filters act on the image vocabulary only.

    Raises:
        TypeError: An option is not a number.
        ValueError: An option is out of range.

    Example:
        >>> SamplingOptions(temperature=0.7, top_k=256)
        SamplingOptions(temperature=0.7, top_k=256, top_p=None, guidance_scale=1.0)
    """

    temperature: float = 1.0
    """Divides the logits; at least 1e-6, or 0, which takes the most likely token. Defaults to 1."""
    top_k: int | None = None
    """Sample among the k most likely tokens; at least 1. Defaults to all tokens."""
    top_p: float | None = None
    """Sample among the smallest set of most likely tokens whose probability reaches p, in (0, 1]. Defaults to all."""
    guidance_scale: float = 1.0
    """Classifier-free guidance g: logits = null + g * (conditional - null), in 0..1e6. Defaults to 1, no guidance, as
    in the paper; other values need a prior that was trained with dropped captions."""

    def __post_init__(self) -> None:
        temperature = as_number("temperature", self.temperature, least=0)
        if 0 < temperature < 1 / LARGEST_FACTOR:
            raise ValueError(
                f"temperature must be at least {1 / LARGEST_FACTOR:g}, or 0 for the most likely token, got "
                f"{self.temperature!r}"
            )
        checked: dict[str, float | None] = {
            "temperature": float(temperature),
            "guidance_scale": float(as_number("guidance_scale", self.guidance_scale, least=0, most=LARGEST_FACTOR)),
        }
        if self.top_k is not None:
            checked["top_k"] = as_integer("top_k", self.top_k, least=1, meaning=" (omit it to keep all tokens)")
        if self.top_p is not None:
            checked["top_p"] = float(as_number("top_p", self.top_p))
            if not 0 < self.top_p <= 1:
                raise ValueError(f"top_p must be in (0, 1] (omit it to keep all tokens), got {self.top_p!r}")
        for name, value in checked.items():  # plain numbers, 1.0 and not 1: equal options are equal in files too
            object.__setattr__(self, name, value)

    @property
    def guided(self) -> bool:
        """Whether sampling needs the logits of the empty caption too."""
        return self.guidance_scale != 1

    def guide(self, logits: Tensor) -> Tensor:
        """Combines conditional and null logits.

        Args:
            logits: (2 P, …), conditional logits first, null logits second; (P, …) without guidance.

        Returns:
            (P, …), in float32 if guided.
        """
        if not self.guided:
            return logits
        conditional, null = logits.float().chunk(2)
        return null + self.guidance_scale * (conditional - null)

    def filter(self, logits: Tensor) -> Tensor:
        """Applies temperature and filters: logits (…, V) to logits with -inf where a token may not be sampled.

        Example:
            >>> SamplingOptions(top_k=2).filter(torch.tensor([1.0, 3.0, 2.0]))
            tensor([-inf, 3., 2.])
        """
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            # By index, not by value: exactly k tokens remain, even if several share the k-th largest logit.
            retained = logits.topk(self.top_k, dim=-1).indices
            logits = torch.full_like(logits, -math.inf).scatter(-1, retained, logits.gather(-1, retained))
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True, stable=True)
            mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            ordered = ordered.masked_fill(mass_before >= self.top_p, -math.inf)
            logits = torch.empty_like(logits).scatter(-1, order, ordered)
        return logits

    def sample(self, logits: Tensor, seeds: Tensor, step: int | Tensor) -> Tensor:
        """Samples one token per image by the Gumbel-max rule.

        Args:
            logits: Guided but unfiltered logits, (B, V).
            seeds: Seeds of the images, int64 (B,).
            step: Number of the token within the image, as for `gumbel`.

        Returns:
            Tokens, int64 (B,).
        """
        noise = gumbel(seeds, step, logits.shape[-1])
        return noise.add_(self.filter(logits.float())).argmax(-1)
