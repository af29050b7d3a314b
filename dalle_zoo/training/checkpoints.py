"""Writes, reads and converts checkpoint files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from dalle_zoo.files import atomic_write
from dalle_zoo.training.averaging import STATE
from dalle_zoo.training.integrity import check_intact, damaged
from dalle_zoo.training.sharded import is_sharded, read_state, read_unsharded, remove
from dalle_zoo.training.strategies.states import by_number
from dalle_zoo.weights import save_weights


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name in the same folder, and renames it once it is on the disk.

    Lightning writes to the system's temporary folder and moves the file. If that is another disk, moving copies, and
    a run killed meanwhile leaves half a checkpoint under the final name.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Writes the file ``path``; ``storage_options`` are not supported, as in the base class."""
        if storage_options is not None:
            raise TypeError(f"storage_options must be None, got {storage_options!r}: checkpoints are local files")
        with atomic_write(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a file, or the folder of shards of a sharded run."""
        path = Path(path)
        if is_sharded(path):
            return unsharded_checkpoint(path)
        return super().load_checkpoint(path, map_location or (lambda storage, _: storage), weights_only)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Removes a file or a folder, without leaving half of it under its name."""
        remove(Path(path))


def unsharded_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a folder of shards as the checkpoint of an unsharded run, in a single process."""
    check_intact(path)
    checkpoint, tensors = read_state(path), read_unsharded(path)
    checkpoint["state_dict"] = tensors.pop("model")
    checkpoint["optimizer_states"] = [
        by_number(tensors.pop(f"optimizer_{number}", {}), groups)
        for number, groups in enumerate(checkpoint.pop("optimizer_groups"))
    ]
    return {**checkpoint, **tensors}


def _read_file(path: Path) -> dict[str, Any]:
    """Reads a checkpoint that is one file.

    Raises:
        ValueError: The file is no checkpoint, or it is damaged.
    """
    try:
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes PyTorch raises nearly anything
        raise damaged(path, str(error).partition("\n")[0][:200]) from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} must be a checkpoint, got a file with {type(checkpoint).__name__}")
    return checkpoint


def consolidate(path: Path, folder: Path, *, averaged: bool = True) -> str:
    """Writes the weights of a checkpoint of any strategy as a component folder of a model.

    It runs in a single process and needs memory for the weights only.

    Args:
        path: Checkpoint: a file, or a folder of shards.
        folder: Existing folder to write to.
        averaged: Whether to prefer averaged weights, if there are any. Defaults to True.

    Returns:
        The stage, "dvae" or "prior".

    Raises:
        ValueError: The path is no checkpoint of a dVAE or a prior, or it is damaged.
    """
    check_intact(path)
    if is_sharded(path):
        checkpoint = read_state(path)
        weights = read_unsharded(path, f"{STATE}/").get(STATE, {}) if averaged else {}
        weights = weights or read_unsharded(path, "model/")["model"]
    else:
        checkpoint = _read_file(path)
        weights = checkpoint.get("state_dict", {})
        average = checkpoint.get(STATE) if averaged else None
        if isinstance(weights, dict) and isinstance(average, dict):
            weights = {**weights, **average}  # only trained weights are averaged
    described: Any = checkpoint.get("dalle_zoo")
    if not isinstance(described, dict) or described.get("stage") not in ("dvae", "prior"):
        found = described.get("stage") if isinstance(described, dict) else "another file"
        raise ValueError(f"{path} must be a checkpoint of a dVAE or a prior, got {str(found)[:100]}")
    if not isinstance(described.get("config"), dict):
        raise ValueError(f"{path} must hold the configuration of its network")
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{path} must hold a dict of tensors as its weights")
    if any(".lora_" in name for name in weights):
        raise ValueError(
            f"{path} has adapters that are not merged yet: run the same `dalle-zoo fit` to its end, or for fewer "
            "steps with trainer.max_steps, which writes the merged weights and the adapters to model/ in the run"
        )
    config = {"type": described["stage"], **described["config"]}
    prefix = "net."
    tensors = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    save_weights(tensors, config, folder)
    return str(described["stage"])
