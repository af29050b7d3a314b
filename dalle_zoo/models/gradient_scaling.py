"""Per-resblock gradient scaling: float16 inside residual branches, with a separate gradient scale for each.

```
forward   x ──► enter ──► LayerNorm ──► to 16 bit ──► attention or MLP ──► to float32 ──► exit ──► + identity
backward  + ◄── / S, filter ◄── LayerNorm ◄── to float32 ◄── 16 bit ◄── to 16 bit ◄── filter, × S ◄── gradient
```
The identity path, its gradient and LayerNorm are float32. Over the depth of a large model, gradients of activations
shrink by more than the exponent range of float16, so no single loss scale serves all blocks. A filter at both ends
sets values that are not finite to zero: an overflow in one block, or above all blocks, does not lower the scale of
another.

Reference: Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), section 2.4, figure 4 and appendix D.

**Units of the scale.** The paper divides its loss by the overall batch and multiplies its scales by the number M of
data-parallel processes. Here the loss is a mean over the local batch, so a scale is the paper's S / M, and does not
depend on M.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dalle_zoo.models.emulation import emulated_float16, through_float16

# K residual blocks; S gradient scale of one of them

Carrier = Literal["float16", "emulated", "float32"]
"""Number format of a branch: float16; float32 rounded to float16 after every operation, for devices without float16
arithmetic; or plain float32, for which scaling changes nothing."""


@dataclass(frozen=True, kw_only=True)
class GradientScalingConfig:
    """When scales grow and shrink; defaults are the paper's (appendix D), without the factor M."""

    start: float = 2.0**13
    """First scale of every block."""
    growth: float = 2.0 ** (1 / 1000)
    """Factor after a step in which all gradients of the block's parameters are finite."""
    backoff: float = 2.0**-0.5
    """Factor after a step in which a gradient of the block's parameters is not finite."""
    cooldown: int = 125
    """Smallest number of steps between two divisions of a scale."""
    smallest: float = 2.0**7
    """Lower limit of a scale."""
    largest: float = 2.0**24
    """Upper limit of a scale."""

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.start <= self.largest:
            raise ValueError(
                f"expected 0 < smallest <= start <= largest, got {self.smallest}, {self.start} and {self.largest}"
            )
        if not self.backoff < 1 <= self.growth or self.backoff <= 0:
            raise ValueError(f"expected 0 < backoff < 1 <= growth, got {self.backoff} and {self.growth}")
        if self.cooldown < 1:
            raise ValueError(f"cooldown must be at least 1, got {self.cooldown}")


class GradientScales:
    """The scales of K residual blocks and their update rule.

    Scales are updated in place, without synchronizing with the device.

    Args:
        count: Number of blocks K.
        config: Constants of the rule. Defaults to the paper's.
        device: Device of the scales. Defaults to the CPU.

    Attributes:
        values: Scales, float32 (K,).
        since_division: Steps since each scale was divided, int64 (K,); the cooldown if it never was.

    Example:
        >>> scales = GradientScales(2)
        >>> scales.update(torch.tensor([True, False]))
        >>> scales.values.log2()
        tensor([13.0010, 12.5000])
    """

    def __init__(
        self,
        count: int,
        config: GradientScalingConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config = config or GradientScalingConfig()
        self.values = torch.full((count,), config.start, device=device)
        self.since_division = torch.full((count,), config.cooldown, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self.values)

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Updates the scales after a step.

        The scale of a block without overflow also grows if the step was skipped because of another block.

        Args:
            finite: Whether all gradients of a block's parameters were finite on every process, bool (K,).
        """
        config = self.config
        self.since_division += 1
        divided = ~finite & (self.since_division >= config.cooldown)
        self.values *= torch.where(finite, config.growth, torch.where(divided, config.backoff, 1.0))
        self.values.clamp_(config.smallest, config.largest)
        self.since_division.masked_fill_(divided, 0)

    def state_dict(self) -> dict[str, Tensor]:
        """Scales and counters, copies on the CPU."""
        return {
            "values": self.values.to("cpu", copy=True),
            "since_division": self.since_division.to("cpu", copy=True),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads the result of `state_dict`.

        Raises:
            ValueError: The state has another number of blocks.
        """
        if len(state["values"]) != len(self):
            raise ValueError(
                f"expected gradient scales of {len(self)} residual blocks, got {len(state['values'])}: "
                "the state belongs to a network of another depth"
            )
        self.values.copy_(state["values"])
        self.since_division.copy_(state["since_division"])


class ScaledBranch:
    """Calls a branch in 16 bit under a gradient scale; to be set as `models.residual.Residual.around`.

    The parameters of norm and branch receive gradients that are S times too large; the training loop must divide them.

    Args:
        scale: Scale S, a float32 scalar that may change in place. It is a tensor because a number would be compiled
            into the code, and every change would recompile it.
        carrier: Number format of the branch. Defaults to "float16".

    Raises:
        ValueError: The carrier is unknown.
    """

    def __init__(self, scale: Tensor, carrier: Carrier = "float16") -> None:
        if carrier not in get_args(Carrier):
            raise ValueError(f"carrier must be one of {', '.join(get_args(Carrier))}, got {carrier!r}")
        self.scale = scale
        self.carrier = carrier

    def __call__(self, x: Tensor, norm: nn.Module, branch: nn.Module) -> Tensor:
        """Computes the summand of the identity path, float32 (…, d)."""
        normalized = norm(_apply(_Enter, x, self.scale))
        with self._arithmetic(branch, x.device.type):
            out = branch(self._cast(normalized))
        return _apply(_Exit, out, self.scale)

    def _cast(self, x: Tensor) -> Tensor:
        if self.carrier == "float16":
            return x.to(torch.float16)
        return through_float16(x) if self.carrier == "emulated" else x

    def _arithmetic(self, branch: nn.Module, device_type: str) -> AbstractContextManager[Any]:
        if self.carrier == "float16":
            return torch.autocast(device_type, torch.float16, cache_enabled=False)  # a weight is used only once
        return emulated_float16(branch) if self.carrier == "emulated" else nullcontext()


def finite_or_zero(x: Tensor) -> Tensor:
    """Replaces NaN and infinities by zero."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


# The scale is an attribute of the context, not a saved tensor. Recomputation begins when the backward pass first asks
# for a saved tensor. If `_Exit` saved one, recomputation would begin before the backward hooks of the branch, with
# which a sharded branch gathers its weights, and would run to the end instead of to the last tensor that is needed.


class _Enter(torch.autograd.Function):
    """Identity in the forward pass; divides the gradient that leaves the branch by the scale and filters it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return finite_or_zero(gradient / ctx.scale), None


class _Exit(torch.autograd.Function):
    """Casts to float32; multiplies the gradient that enters the branch by the scale, filters it, and casts it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.scale, ctx.dtype = scale, x.dtype
        return x.float() if x.dtype != torch.float32 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Infinities from the cast are not filtered: they reach the parameters and lower the scale of this block.
        return finite_or_zero(gradient * ctx.scale).to(ctx.dtype), None


def _apply(function: Any, *arguments: Tensor) -> Tensor:
    # torch 2.13 declares no types of `apply`, later ones do.
    result: Tensor = function.apply(*arguments)
    return result
