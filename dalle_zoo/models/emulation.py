"""Emulates float16 on devices without float16 arithmetic: float32 numbers, rounded after every operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


def through_float16(x: Tensor) -> Tensor:
    """Rounds to float16 and back; the gradient is rounded likewise. Overflow gives infinity, underflow zero."""
    function: Any = _Round  # torch 2.13 declares no types of `apply`, later ones do
    rounded: Tensor = function.apply(x)
    return rounded


@contextmanager
def emulated_float16(module: nn.Module) -> Iterator[None]:
    """Runs the forward pass of a module in `EmulatedFloat16`, but not its hooks, such as those that gather shards."""
    forward = module.forward

    def rounded(*arguments: Any, **options: Any) -> Any:
        with EmulatedFloat16():
            return forward(*arguments, **options)

    module.forward = rounded
    try:
        yield
    finally:
        del module.forward  # restores the method of the class


class EmulatedFloat16(TorchFunctionMode):
    """Rounds parameters, and the result of every function, to float16; gradients likewise, in the backward pass.

    The arithmetic inside a function stays float32, as in float16 hardware.

    Example:
        >>> with EmulatedFloat16():
        ...     torch.tensor([1e-9, 1.0, 1e9]) * 1
        tensor([0., 1., inf])
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls a function on rounded parameters, and rounds its results."""
        del types
        args, kwargs = tree_map(_round_parameter, (args, dict(kwargs or {})))
        return tree_map(_round, func(*args, **kwargs))


def _round(value: Any) -> Any:
    return through_float16(value) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _round_parameter(value: Any) -> Any:
    return _round(value) if isinstance(value, nn.Parameter) else value


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.half().float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        del ctx
        return gradient.half().float()
