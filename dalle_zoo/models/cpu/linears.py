"""Linear layers with packed matrices, for the few rows of a decoding step on a CPU.

With few rows, PyTorch's matrix product reaches only a half to two thirds of the memory bandwidth, because the matrix
is stored in a layout for many rows. oneDNN has layouts for few rows. Packing copies the weights, once per call of the
sampler.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.models.cpu import onednn

Net = TypeVar("Net", bound=nn.Module)


class PackedLinear(nn.Module):
    """A linear layer with the same parameters and a packed copy of its matrix.

    Args:
        linear: The plain layer.
        rows: Number of input rows to pack for; other numbers give the same values more slowly.
    """

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rows = rows
        self.packed: Tensor | None = None  # packed on first use: sampling never runs the text head

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        if x.dtype != self.weight.dtype:  # happens only under autocast
            return F.linear(x, self.weight, self.bias)
        if self.packed is None:
            self.packed = onednn.reorder_linear(self.weight.detach(), self.rows)
        return onednn.linear(x, self.packed, self.bias)


def with_packed_linears(net: Net, rows: int) -> Net:
    """Returns a copy of a network with packed matrices, or the network itself if packing is not faster.

    The copy shares all parameters with the network. Only plain linear layers in float32 or bfloat16 on the CPU are
    packed, and none under autocast.

    Args:
        net: The network.
        rows: Number of rows of a decoding step, P * n.
    """
    if torch.is_autocast_enabled("cpu") or not onednn.linears_work() or not _can_pack(net):
        return net
    return _copied(net, rows)


def _can_pack(net: nn.Module) -> bool:
    return any(_is_plain(module) for module in net.modules())


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is PyTorch's own linear layer: not a subclass, quantized, sharded or hooked."""
    if type(module) is not nn.Linear or type(module.weight.data) is not Tensor:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    return module.weight.device.type == "cpu" and onednn.computes_in(module.weight.dtype)


def _copied(module: Net, rows: int) -> Net:
    if _is_plain(module):
        return PackedLinear(module, rows)  # type: ignore[return-value, arg-type]
    copy = module.__new__(type(module))
    copy.__dict__ = module.__dict__ | {
        "_modules": {name: child and _copied(child, rows) for name, child in module._modules.items()},
        "_compiled_call_impl": None,  # it would call the original
    }
    return copy
