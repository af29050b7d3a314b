"""Residual branches, and the options for running one: recomputation, compilation, and a separate precision.

The network defines what a branch computes. How it is run is set from outside for every block, so the network does not
depend on the training setup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Around = Callable[[Tensor, nn.Module, nn.Module], Tensor]
"""Computes the summand of the identity path from (x, norm, branch)."""


def plain(x: Tensor, norm: nn.Module, branch: nn.Module) -> Tensor:
    """Computes ``branch(norm(x))``, (…, d) to (…, d)."""
    return cast(Tensor, branch(norm(x)))


GRAPHS = 64
"""Largest number of graphs of one ``around``: one for every mask, shape and dtype, with and without gradients.
PyTorch's limit is 8, after which it runs uncompiled."""


@cache
def compiled(around: Around) -> Around:
    """Compiles an ``around``, once per process; branches of one kind share their graphs."""
    from torch._dynamo import config  # it takes seconds to import

    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    return torch.compile(around, dynamic=False)


class Residual(nn.Module):
    """``x + branch(norm(x))``: the identity path of figure 4, without parameters of its own.

    Attributes:
        recompute: Whether the branch stores only its input and is computed again in the backward pass (section 2.5:
            activations inside each residual block are recomputed).
        compiled: Whether the branch is compiled from its second call on. The first call creates what is cached between
            calls, such as a mask on the device, and must not become part of a graph.
        around: Function that calls norm and branch; replace it to run the branch in another precision.
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
            # A branch uses no random numbers, so there is no generator state to preserve.
            added: Tensor = checkpoint(around, x, norm, branch, use_reentrant=False, preserve_rng_state=False)
        else:
            added = around(x, norm, branch)
        self._called = True
        return x + added


def shard_axis(name: str, shape: Sequence[int], shards: int) -> int:
    """Axis along which a parameter is sharded: inputs of the MLP's second matrix, otherwise the first (table 2).

    ``fully_shard`` divides axes other than the first only evenly; if the number is not a multiple, the first is used.
    """
    return 1 if name.endswith("mlp.output.weight") and shape[1] % shards == 0 else 0


def num_low_rank_matrices(name: str) -> int:
    """Number of matrices into which the gradient of a branch's matrix is split for PowerSGD.

    Queries, keys and values are separate matrices, as in table 2. The rows of a shard differ from the paper's: it
    shards each of the three, while here a shard has rows of their stack.
    """
    return 3 if name.endswith("qkv.weight") else 1


class ResidualBlock(NamedTuple):
    """One residual block: the unit of sharding, of recomputation and of gradient scaling."""

    name: str
    """Name of the branch in its network, such as ``layers.3.attention``."""
    norm: nn.LayerNorm
    branch: nn.Module
    residual: Residual
