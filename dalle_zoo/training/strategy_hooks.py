"""What training asks of a strategy, with defaults for strategies that hold unsharded weights, Lightning's included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from dalle_zoo.training.precision import StrategyKind


class StrategyHooks:
    """Hooks of a strategy. The defaults fit every strategy with a complete network in each process.

    A strategy of its own derives from this class and from one of Lightning's, and overrides what differs.
    """

    shards: ClassVar[bool] = False
    """Whether each process holds only a shard of the network."""
    defers_weights: ClassVar[bool] = False
    """Whether `shard` accepts a network without weights, which no process could hold unsharded."""
    needs_units: ClassVar[bool] = False
    """Whether the strategy works on the residual blocks of a network, which a stage must then name."""
    flat: ClassVar[bool] = False
    """Whether parameters are shards of flat vectors, without the names and shapes of the weights."""
    compiles: ClassVar[bool] = True
    """Whether residual blocks can be compiled."""
    precision_kind: ClassVar[StrategyKind] = "plain"
    """Kind of precision plugin that fits the strategy."""

    def check_precision(self, name: str) -> None:
        """Raises `ValueError` for a precision that the strategy cannot train with."""

    def shard(self, net: nn.Module, units: Sequence[nn.Module], entries: Sequence[str]) -> None:
        """Shards a network in place; called only if `shards`.

        Args:
            net: Network.
            units: Modules that are gathered one at a time, in the order of their use.
            entries: Methods of the network that training calls.
        """
        raise NotImplementedError(f"{type(self).__name__} has no shard method, but says that it shards")

    def before_step(self, finite: Tensor | None) -> Mapping[str, float]:
        """Completes the gradients of a step, after they are unscaled and before they are clipped.

        Args:
            finite: Whether this process's gradients are finite, bool (), if the precision checks them.

        Returns:
            Metrics to log. Defaults to none.
        """
        return {}

    def clip(self, module: LightningModule, optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
        """Clips the gradients; a value of None leaves them as they are."""
        module.clip_gradients(optimizer, value, algorithm)

    def gradient_norm(self, module: nn.Module) -> Tensor:
        """Returns the norm of all gradients, over all shards, a scalar; every process calls it."""
        norm = get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def release(self, module: nn.Module) -> None:
        """Frees weights that are still gathered, so that the module's parameters are those of this process."""

    def unsharded_weights(self, prefix: str) -> dict[str, Tensor] | None:
        """Returns the unsharded weights below a prefix on process 0, an empty dictionary on the others.

        Every process calls it. Defaults to None: the module holds them.
        """
        return None


_DEFAULT = StrategyHooks()


def hooks_of(strategy: object) -> StrategyHooks:
    """Returns the hooks of a strategy; the defaults for one of Lightning's, or for its name."""
    return strategy if isinstance(strategy, StrategyHooks) else _DEFAULT
