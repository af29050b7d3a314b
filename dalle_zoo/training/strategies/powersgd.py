"""Low-rank gradients between processes or machines, for training over slow networks (section 2.5)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch import Tensor
from torch import distributed as dist

from dalle_zoo.models.initial import local, shard_like
from dalle_zoo.models.residual import num_low_rank_matrices
from dalle_zoo.training.powersgd import PowerSGD
from dalle_zoo.training.strategies.fsdp2 import REPLICATE, SHARD, FullyShard
from dalle_zoo.training.strategies.states import EXCHANGE
from dalle_zoo.training.strategy_hooks import StrategyHooks


class ExchangesGradients(StrategyHooks, ParallelStrategy):
    """Base of strategies whose backward pass does not average the gradients of the network's copies.

    The exchange happens in `before_step`. Matrices of the residual blocks are sent as low-rank factors, everything
    else uncompressed in float32: embeddings, heads, gains and biases.
    """

    needs_units = True
    exchange: PowerSGD | None = None
    _errors: Mapping[str, Tensor] | None = None
    """Error buffers of a checkpoint, until the exchange exists."""

    @abstractmethod
    def make_exchange(self) -> PowerSGD:
        """Builds the exchange, after the processes are connected."""

    def check_precision(self, name: str) -> None:
        """Raises `ValueError` for ``16-mixed``, whose gradient scaler skips steps in single processes."""
        if name == "16-mixed":
            raise ValueError("16-mixed decides process by process what to skip: use 16-resblock or bf16-mixed")

    def before_step(self, finite: Tensor | None) -> Mapping[str, float]:
        """Exchanges the gradients; logs whether the step is skipped."""
        return {"exchange/skipped": float(not self.exchange_gradients(finite))}

    def exchange_gradients(self, finite: Tensor | None = None) -> bool:
        """Averages the gradients over the copies.

        Args:
            finite: Whether this process's gradients are finite, bool (), if the precision checks them.

        Returns:
            Whether all gradients of all processes are finite. If not, all gradients are set to None everywhere.
        """
        if self.exchange is None:
            self.exchange = self.make_exchange()
            if self._errors:
                self.exchange.load_error_means(dict(self._parts(self._errors)))
        gradients = {name: local(p.grad) for name, p in self._parameters() if p.grad is not None}
        low_rank = {name: gradient for name, gradient in gradients.items() if name in self._compressed}
        others = [gradient for name, gradient in gradients.items() if name not in self._compressed]
        done = self.exchange.reduce(dict(self._parts(low_rank)), others, finite)
        if not done:
            for _, parameter in self._parameters():
                parameter.grad = None
        return done

    def error_means(self) -> dict[str, Tensor]:
        """Returns the mean errors, by the names and in the shapes of the parameters; every process calls it."""
        if self.exchange is None:  # no step since the checkpoint was loaded
            return dict(self._errors or {})
        means = self.exchange.error_means()
        shapes = {name: local(parameter.detach()) for name, parameter in self._parameters()}
        unsharded = {}
        for name in sorted({part.partition("#")[0] for part in means}):
            pieces = [means.get(part, torch.zeros(0)) for part, _ in _split(name, shapes[name])]
            if all(piece.numel() for piece in pieces):
                unsharded[name] = torch.cat(pieces)
        return unsharded

    def _parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        assert self.lightning_module is not None
        return self.lightning_module.named_parameters()

    @cached_property
    def _compressed(self) -> set[str]:
        """Names of the matrices that are sent as factors."""
        net: Any = self.lightning_module.net  # type: ignore[union-attr]
        matrices = {p for block in net.residual_blocks() for p in block.branch.parameters() if p.ndim == 2}
        return {name for name, parameter in self._parameters() if parameter in matrices}

    @staticmethod
    def _parts(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            yield from _split(name, tensor)


def _split(name: str, matrix: Tensor) -> list[tuple[str, Tensor]]:
    """Matrices to factorize; those of one parameter are numbered."""
    count = num_low_rank_matrices(name)
    if count == 1:
        return [(name, matrix)]
    return [(f"{name}#{number}", part) for number, part in enumerate(matrix.chunk(count))]


class DDPPowerSGD(ExchangesGradients, DDPStrategy):
    """Data parallelism with an unsharded network per process and low-rank gradients.

    Args:
        rank: Rank of every gradient matrix; the smallest rank without a loss of quality grows with the width (table
            1).
        wire_bits: Bits of the factors, 32 or 16 (bfloat16). Defaults to 32.

    Example:
        >>> from dalle_zoo.training.strategies import make_strategy
        >>> strategy = make_strategy("ddp_powersgd(rank=32, wire_bits=16)")
        >>> strategy.rank, strategy.wire
        (32, torch.bfloat16)
    """

    def __init__(self, rank: int, wire_bits: int = 32) -> None:
        super().__init__()
        self.rank, self.wire = _positive(rank), _wire(wire_bits)

    def make_exchange(self) -> PowerSGD:
        """Averages over all processes."""
        return PowerSGD(self.rank, wire_dtype=self.wire)

    def configure_ddp(self) -> None:
        """Broadcasts the weights, and uses no wrapper: torch's would average the gradients itself."""
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            dist.broadcast(tensor, 0)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Adds the error buffers."""
        checkpoint[EXCHANGE] = self.error_means()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Removes the error buffers and keeps them for the exchange."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._errors = checkpoint.pop(EXCHANGE, {})
        return checkpoint


class HSDPPowerSGD(ExchangesGradients, FullyShard):
    """Shards in each machine, with low-rank gradients between machines, as in the paper (figure 5).

    Args:
        rank: Total rank of a gradient matrix over its shards (table 1: 896 for 12 billion parameters on machines with
            eight GPUs); each process factorizes its own shard with rank / shard_size.
        shard_size: Number of processes that share a copy of the network. Defaults to 0: those of one machine.
        wire_bits: Bits of the factors, 32 or 16 (bfloat16). Defaults to 32.

    Example:
        >>> from dalle_zoo.training.strategies import make_strategy
        >>> strategy = make_strategy("hsdp_powersgd(rank=896, shard_size=8)")
        >>> strategy.rank // strategy.shard_size  # rank of the shard of each process
        112
    """

    def __init__(self, rank: int, shard_size: int = 0, wire_bits: int = 32) -> None:
        super().__init__(shard_size)
        self.rank, self.wire = _positive(rank), _wire(wire_bits)

    @property
    def sharding_mesh(self) -> Any:
        """Mesh of one machine: with all machines, ``fully_shard`` would average uncompressed gradients."""
        return self.mesh[SHARD]

    def setup_environment(self) -> None:
        """Connects the processes; raises `ValueError` for a rank that is not a multiple of the shards."""
        super().setup_environment()
        shards = self.mesh[SHARD].size()
        if self.rank % shards:
            raise ValueError(f"rank {self.rank} must be a multiple of the {shards} shards")

    def make_exchange(self) -> PowerSGD:
        """Averages over the processes with the same shard."""
        group = self.mesh[REPLICATE].get_group()
        return PowerSGD(self.rank // self.mesh[SHARD].size(), group, wire_dtype=self.wire)

    def exchange_state(self) -> dict[str, Tensor]:
        """Returns the mean of the error buffers over the machines, sharded like the parameters."""
        parameters = dict(self._parameters())
        return {name: shard_like(mean, parameters[name]) for name, mean in self.error_means().items()}

    def load_exchange_state(self, load: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Restores error buffers, from any number of shards and machines."""
        sharded = {
            name: torch.zeros_like(parameter, dtype=torch.float32)
            for name, parameter in self._parameters()
            if name in self._compressed
        }
        load(sharded)
        self._errors = {name: local(tensor.detach()) for name, tensor in sharded.items()}


def _positive(rank: int) -> int:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return rank


def _wire(bits: int) -> torch.dtype:
    if bits not in (16, 32):
        raise ValueError(f"wire_bits must be 16 or 32, got {bits}")
    return torch.bfloat16 if bits == 16 else torch.float32
