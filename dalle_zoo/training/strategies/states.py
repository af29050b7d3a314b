"""Saves and loads sharded runs, in one format for all strategies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dalle_zoo.models.initial import copy_shard
from dalle_zoo.training import averaging
from dalle_zoo.training.integrity import damage_of, damaged
from dalle_zoo.training.sharded import is_sharded, load_sharded, names, read_state, save_sharded
from dalle_zoo.training.strategy_hooks import StrategyHooks

log = logging.getLogger(__name__)

DROPPED = "the error buffers of PowerSGD in the checkpoint are dropped: this strategy sends uncompressed gradients"

EXCHANGE = "exchange"
"""Key of the error buffers of a strategy that compresses gradients."""
_UNSHARDED = StateDictOptions(full_state_dict=True)


Load = Callable[[str], None]
Fill = Callable[[Mapping[str, Tensor]], None]


class ShardedStates(StrategyHooks, ParallelStrategy):
    """Saving and loading of a sharded strategy. Lightning calls every method in every process."""

    shards = True
    needs_units = True

    @property
    def root(self) -> nn.Module:
        """The module as the strategy trains it."""
        assert self.model is not None
        return self.model

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: checkpoints are loaded into shards, which must exist."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """False: `load_checkpoint` restores the optimizer."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the weights as DTensors, by their names in the LightningModule."""
        return cast(dict[str, Any], get_model_state_dict(self.root))

    def unsharded_weights(self, prefix: str) -> dict[str, Tensor]:
        """Returns unsharded weights below a prefix on process 0, nothing on the others; every process calls it."""
        unsharded = {}
        for name, tensor in get_model_state_dict(self.root).items():
            if name.startswith(prefix):
                assert isinstance(tensor, Tensor)
                tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # one tensor at a time
                if self.is_global_zero:
                    unsharded[name.removeprefix(prefix)] = tensor.cpu()
        return unsharded

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the state of the optimizer as DTensors, by the names of the weights."""
        return get_optimizer_state_dict(self.root, _bare(optimizer))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Does nothing: `load_checkpoint` loads it."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Does nothing: `load_checkpoint` loads it."""

    def exchange_state(self) -> dict[str, Tensor]:
        """Returns the error buffers of a gradient exchange, as DTensors. Defaults to none."""
        return {}

    def load_exchange_state(self, load: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Restores `exchange_state`: ``load`` writes into tensors, sharded or not, by name."""
        log.warning(DROPPED)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a folder of shards."""
        if storage_options is not None:
            raise TypeError(f"storage_options must be None, got {storage_options!r}: checkpoints are local folders")
        optimizers = checkpoint.pop("optimizer_states", [])
        tensors = {
            "model": checkpoint.pop("state_dict"),
            averaging.STATE: checkpoint.pop(averaging.STATE, {}),
            EXCHANGE: self.exchange_state(),
            **{f"optimizer_{number}": state["state"] for number, state in enumerate(optimizers)},
        }
        rest = {**checkpoint, "optimizer_groups": [state["param_groups"] for state in optimizers]}
        save_sharded(tensors, rest, Path(self.broadcast(filepath)))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a folder of shards, or the file of an unsharded run."""
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = self._from_shards(path) if is_sharded(path) else self._from_file(path)
        checkpoint.pop(averaging.STATE, None)
        return checkpoint

    @property
    def _trains(self) -> bool:
        return self.lightning_module is not None and self.lightning_module.trainer.state.fn == TrainerFn.FITTING

    def _from_shards(self, path: Path) -> dict[str, Any]:
        self._check_shards(path)
        checkpoint = read_state(path)
        known = names(path)

        def load(key: str) -> None:
            state = get_model_state_dict(self.root)
            load_sharded({key: state}, path)
            set_model_state_dict(self.root, state)

        averaged = any(name.startswith(f"{averaging.STATE}/") for name in known)
        self._load_weights(averaged, load, lambda tensors: load_sharded({averaging.STATE: tensors}, path))
        groups = checkpoint.pop("optimizer_groups")
        if self._trains:
            for number, optimizer in enumerate(self.optimizers):
                state = get_optimizer_state_dict(self.root, optimizer)["state"]
                load_sharded({f"optimizer_{number}": state}, path)
                state = cast(Any, {"state": state, "param_groups": groups[number]})
                set_optimizer_state_dict(self.root, optimizer, optim_state_dict=state)
            # Matrices that were sent uncompressed have no buffers.
            if left := {name.removeprefix(f"{EXCHANGE}/") for name in known if name.startswith(f"{EXCHANGE}/")}:
                self.load_exchange_state(lambda all_: load_sharded({EXCHANGE: _some(all_, left)}, path))
        return checkpoint

    def _check_shards(self, path: Path) -> None:
        """Raises `DamagedCheckpointError` in every process for damage that any of them finds in its part."""
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, damage_of(path, dist.get_rank(), dist.get_world_size(), digests=True))
        damage = next((text for text in found if text is not None), None)
        if damage is not None:
            raise damaged(path, damage)

    def _from_file(self, path: Path) -> dict[str, Any]:
        checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        weights = {"model": checkpoint.pop("state_dict"), averaging.STATE: checkpoint.get(averaging.STATE)}

        def load(key: str) -> None:
            set_model_state_dict(self.root, dict(weights[key]), options=_UNSHARDED)

        average = weights[averaging.STATE] or {}
        self._load_weights(bool(average), load, lambda tensors: _copy_all(tensors, average))
        if self._trains:
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                order = cast(Any, get_optimizer_state_dict(self.root, optimizer)["param_groups"])
                named = cast(Any, by_name(state, order))
                set_optimizer_state_dict(self.root, optimizer, optim_state_dict=named, options=_UNSHARDED)
            if unsharded := checkpoint.pop(EXCHANGE, {}):
                self.load_exchange_state(lambda all_: _copy_all(_some(all_, unsharded), unsharded))
        return checkpoint

    def _load_weights(self, averaged: bool, load: Load, fill: Fill) -> None:
        """Loads the weights and, into its callback, the average; without training, the average as weights.

        Args:
            averaged: Whether there is an average.
            load: Loads the tensors of a key of the checkpoint into the module.
            fill: Writes the average into tensors by name.
        """
        module = self.lightning_module
        assert module is not None
        callbacks: list[Any] = module.trainer.callbacks if averaged else []  # type: ignore[attr-defined]
        keepers = [callback for callback in callbacks if isinstance(callback, averaging.WeightEMA)]
        if keepers and not self._trains:
            load(averaging.STATE)
            return
        for keeper in keepers:
            if self.flat:  # its shards have no names, so load it through the module
                load(averaging.STATE)
                keeper.adopt(module)
            else:
                keeper.fill(module, fill)
        load("model")


def _some(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name in wanted}


def _copy_all(tensors: Mapping[str, Tensor], unsharded: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        copy_shard(tensor, unsharded[name])


def _bare(optimizer: Optimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def by_name(state: Mapping[str, Any], order: list[dict[str, Any]]) -> dict[str, Any]:
    """Renames the keys of an optimizer state from numbers, as in one process, to the names of the weights.

    Args:
        state: State with ``state`` and ``param_groups``.
        order: Groups whose ``params`` are names, in the same order.
    """
    every = list(_members(order))
    return {
        "state": {every[number]: entry for number, entry in state["state"].items()},
        "param_groups": [
            {**group, "params": [every[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def by_number(state: Mapping[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Reverses `by_name`, for ``Optimizer.load_state_dict`` in one process."""
    numbers = {name: number for number, name in enumerate(_members(groups))}
    return {
        "state": {numbers[name]: entry for name, entry in state.items()},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }


def _members(groups: list[dict[str, Any]]) -> Iterator[str]:
    for group in groups:
        yield from group["params"]
