"""Per-resblock gradient scaling: float16 inside residual branches, each with a gradient scale of its own.

```
forward   x ──► enter ──► LayerNorm ──► to 16 bit ──► attention or MLP ──► to float32 ──► exit ──► + identity
backward  + ◄── / S, filter ◄── LayerNorm ◄── to float32 ◄── 16 bit ◄── to 16 bit ◄── filter, × S ◄── gradient
```
The identity path, its gradient and LayerNorm are float32. Gradients of activations shrink over the depth of a large
model by more than the exponents of float16 span, so no single loss scale serves all blocks. A filter sets what is not
finite to zero, at both ends: nothing that overflows in one block, or above all blocks, lowers the scale of another.

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
"""What carries the numbers of a branch: float16; float32 numbers that are rounded to float16 after every operation,
for devices without float16 arithmetic; or plain float32, where scaling changes nothing."""


@dataclass(frozen=True, kw_only=True)
class GradientScalingConfig:
    """When scales grow and shrink; defaults are the paper's (appendix D), without the factor M."""

    start: float = 2.0**13
    """First scale of every block."""
    growth: float = 2.0 ** (1 / 1000)
    """Factor after a step in which all gradients of the block's parameters are finite."""
    backoff: float = 2.0**-0.5
    """Factor after a step in which one is not."""
    cooldown: int = 125
    """Steps from one division of a scale to the next at the earliest."""
    smallest: float = 2.0**7
    """Lower limit, after every change."""
    largest: float = 2.0**24
    """Upper limit, after every change."""

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
    """The scales of K residual blocks and the rule that moves them.

    They change in place, and no change waits for the device.

    Args:
        count: Blocks K.
        config: Constants of the rule.
        device: Where the scales lie.

    Attributes:
        values: Scales, float32 (K,).
        since_division: Updates since each scale was divided, int64 (K,); as many as the cool-down where it never was.

    Example:
        >>> scales = GradientScales(2)
        >>> scales.update(torch.tensor([True, False]))
        >>> scales.values.log2()
        tensor([13.0010, 12.5000])
    """

    def __init__(
        self,
        count: int,
        config: GradientScalingConfig = GradientScalingConfig(),
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.values = torch.full((count,), config.start, device=device)
        self.since_division = torch.full((count,), config.cooldown, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self.values)

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Moves the scales after a step.

        A block without overflow grows also where another's made the step a skipped one.

        Args:
            finite: Whether all gradients of a block's parameters were finite, on every process, bool (K,).
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
        """Takes over what `state_dict` gave.

        Raises:
            ValueError: It has another number of blocks.
        """
        if len(state["values"]) != len(self):
            raise ValueError(
                f"expected gradient scales of {len(self)} residual blocks, got {len(state['values'])}: "
                "the state is of a network of another depth"
            )
        self.values.copy_(state["values"])
        self.since_division.copy_(state["since_division"])


class ScaledBranch:
    """Calls a branch in 16 bit under a gradient scale; stands in `models.residual.Residual.around`.

    The parameters of norm and branch receive gradients that are S times too large: whoever trains divides them.

    Args:
        scale: S, a float32 scalar that may change in place. It is a tensor because a number would be compiled into
            the code, which every change would then make anew.
        carrier: What carries the numbers of the branch.

    Raises:
        ValueError: There is no such carrier.
    """

    def __init__(self, scale: Tensor, carrier: Carrier = "float16") -> None:
        if carrier not in get_args(Carrier):
            raise ValueError(f"carrier must be one of {', '.join(get_args(Carrier))}, got {carrier!r}")
        self.scale = scale
        self.carrier = carrier

    def __call__(self, x: Tensor, norm: nn.Module, branch: nn.Module) -> Tensor:
        """What is added to the identity path, float32 (…, d)."""
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
            return torch.autocast(device_type, torch.float16, cache_enabled=False)  # a weight is used but once
        return emulated_float16(branch) if self.carrier == "emulated" else nullcontext()


def finite_or_zero(x: Tensor) -> Tensor:
    """The filter: NaN and infinities become zero."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


# The scale is an attribute of the context and no saved tensor. Recomputation begins when the backward pass first asks
# for a saved tensor. Were that one of `_Exit`, it would begin before the backward hooks of the branch, by which a
# sharded branch gathers its weights, and would run to the very end instead of to the last tensor that is needed.


class _Enter(torch.autograd.Function):
    """Identity; the gradient that leaves the branch is divided by the scale and filtered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return finite_or_zero(gradient / ctx.scale), None


class _Exit(torch.autograd.Function):
    """To float32; the gradient that comes to the branch is multiplied by the scale, filtered, and cast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.scale, ctx.dtype = scale, x.dtype
        return x.float() if x.dtype != torch.float32 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # What the cast makes infinite is not filtered: it reaches the parameters and lowers this block's scale.
        return finite_or_zero(gradient * ctx.scale).to(ctx.dtype), None


def _apply(function: Any, *arguments: Tensor) -> Tensor:
    # torch 2.13 declares no types of `apply`, later ones do.
    result: Tensor = function.apply(*arguments)
    return result
