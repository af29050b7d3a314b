"""Weight matrices laid out for the few rows of a decoding step on a CPU.

PyTorch multiplies a few rows by a matrix at a half to two thirds of the memory's rate, because its layout is made for
many. oneDNN, which is part of PyTorch, has layouts of its own for that; bringing weights into them costs a copy of
the weights, once per call. The operators are those that torch.compile uses when it freezes a network.
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Net = TypeVar("Net", bound=nn.Module)


class PackedLinear(nn.Module):
    """A linear layer with the same parameters and a packed copy of its matrix.

    Args:
        linear: The layer.
        rows: Rows that inputs will have; others work, but not as fast.
    """

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rows = rows
        self.packed: Tensor | None = None  # until it is needed: sampling uses no text head

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        if x.dtype != self.weight.dtype:  # which only autocast allows
            return F.linear(x, self.weight, self.bias)
        if self.packed is None:
            self.packed = _reorder(self.weight.detach(), self.rows)
        return _multiply(x, self.packed, self.bias)


def with_packed_linears(net: Net, rows: int) -> Net:
    """A copy of a network for sampling, with the same parameters and packed matrices; itself where that is no gain.

    Args:
        net: The network; only plain linear layers in float32 or bfloat16 on the CPU are packed, none under autocast.
        rows: Rows of a step, P * n.
    """
    if torch.is_autocast_enabled("cpu") or not _works() or not _can_pack(net):
        return net
    return _copied(net, rows)


def _can_pack(net: nn.Module) -> bool:
    return any(_is_plain(module) for module in net.modules())


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer as PyTorch has it: not a subclass, quantized, sharded or hooked."""
    if type(module) is not nn.Linear or type(module.weight.data) is not Tensor:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    fast = module.weight.dtype == torch.float32 or (module.weight.dtype == torch.bfloat16 and _fast_bfloat16())
    return fast and module.weight.device.type == "cpu"


def _copied(module: Net, rows: int) -> Net:
    if _is_plain(module):
        return PackedLinear(module, rows)  # type: ignore[return-value, arg-type]
    copy = module.__new__(type(module))
    copy.__dict__ = module.__dict__ | {
        "_modules": {name: child and _copied(child, rows) for name, child in module._modules.items()},
        "_compiled_call_impl": None,  # it would call the original
    }
    return copy


# Private operators: without them, or should they change, layers stay as they are.


def _reorder(weight: Tensor, rows: int) -> Tensor:
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return out


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


@cache
def _fast_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
@torch.inference_mode()
def _works() -> bool:
    """Whether the operators are there and compute a linear layer."""
    weight, bias, x = torch.arange(12.0).view(3, 4), torch.arange(3.0), torch.arange(8.0).view(2, 4)
    try:
        with torch.autocast("cpu", enabled=False):
            return torch.equal(_multiply(x, _reorder(weight, 2), bias), x @ weight.t() + bias)
    except (AttributeError, RuntimeError, TypeError):
        return False
