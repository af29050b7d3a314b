"""Residual branches, and what may be put around one: recomputation, compilation, and a precision of its own.

The network says what a branch computes; how its backward pass is done is set from outside, block by block, so that
the network itself stays the same whatever it is trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Around = Callable[[Tensor, nn.Module, nn.Module], Tensor]
"""Computes what is added to the identity path from (x, norm, branch)."""


def plain(x: Tensor, norm: nn.Module, branch: nn.Module) -> Tensor:
    """``branch(norm(x))``, (…, d) to (…, d)."""
    return cast(Tensor, branch(norm(x)))


GRAPHS = 64
"""Graphs that one way of calling branches may have: for every mask, shape and type, with and without gradients.
PyTorch would stop at 8 and go on uncompiled."""


@cache
def compiled(around: Around) -> Around:
    """What PyTorch's compiler makes of it; branches of one kind share their graphs."""
    from torch._dynamo import config  # it takes seconds to import

    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    return torch.compile(around, dynamic=False)


class Residual(nn.Module):
    """``x + branch(norm(x))``: the identity path of figure 4, without parameters of its own.

    Attributes:
        recompute: Whether the branch keeps its input alone and is computed once more in the backward pass
            (section 2.5: activations inside each residual block are recomputed).
        compiled: Whether the branch is compiled, from its second call on: at the first it makes what it keeps between
            calls, such as a mask on the device, which must not become part of a graph.
        around: How the branch is called; a precision of one's own comes in here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False
        self.compiled = False
        self._called = False
        self.around: Around = plain

    def forward(self, x: Tensor, norm: nn.Module, branch: nn.Module) -> Tensor:
        """(…, d) to (…, d)."""
        around = compiled(self.around) if self.compiled and self._called else self.around
        if self.recompute and torch.is_grad_enabled():
            # Nothing in a branch is random, so there is no state of a generator to keep.
            added: Tensor = checkpoint(around, x, norm, branch, use_reentrant=False, preserve_rng_state=False)
        else:
            added = around(x, norm, branch)
        self._called = True
        return x + added


def shard_axis(name: str, shape: Sequence[int], shards: int) -> int:
    """Axis along which a parameter is sharded: inputs of the MLP's second matrix, otherwise the first (table 2).

    ``fully_shard`` divides any axis but the first only evenly; where it cannot, the first is taken.
    """
    return 1 if name.endswith("mlp.output.weight") and shape[1] % shards == 0 else 0


def num_low_rank_matrices(name: str) -> int:
    """Number of matrices into which the gradient of a branch's matrix is split for PowerSGD.

    Queries, keys and values are separate matrices, as in table 2. The rows of a shard differ: the paper shards each of
    the three, here a shard has rows of their stack.
    """
    return 3 if name.endswith("qkv.weight") else 1


class ResidualBlock(NamedTuple):
    """One residual block: the unit of sharding, of recomputation and of gradient scaling."""

    name: str
    """Of the branch in its network, such as ``layers.3.attention``."""
    norm: nn.LayerNorm
    branch: nn.Module
    residual: Residual
