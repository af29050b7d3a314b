"""Checkpoints as folders of shards: each process writes its shard, and any number of processes can read them.

```
00000123.ckpt/
  shard-00001-model-00001-of-00001.safetensors   tensors of process 0, with their offsets in the unsharded tensors
  …
  state.pt                                       other values: loops, schedules, parameter groups of the optimizer;
                                                 size and digest of every shard
```
Tensors are stored as safetensors, and ``state.pt`` is read with ``weights_only``, so that no pickle is trusted. The
folder is written under a temporary name and renamed after every process has finished.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dalle_zoo.files import sha256_file, sync
from dalle_zoo.workspaces import new_path, place_folder, workspace

STATE = "state.pt"
DIGESTS = "digests"
"""Key in ``state.pt``: file name to size, bytes, and SHA-256 of every shard."""
_SEPARATOR = "/"


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is a folder of shards."""
    return (path / STATE).is_file()


def save_sharded(tensors: Mapping[str, Any], rest: Mapping[str, Any], path: Path) -> None:
    """Writes a folder of shards, atomically; every process calls it.

    Args:
        tensors: Nested by names. Each process writes its shards; one process writes unsharded tensors.
        rest: Values other than tensors; those of process 0 are written.
        path: Folder on a file system that all processes share.
    """
    first = dist.get_rank() == 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with workspace(path) if first else nullcontext() as folder:  # the claim of process 0 is that of the run
        names: list[Any] = [str(new_path(folder)) if folder is not None else None]
        dist.broadcast_object_list(names)
        aside = Path(names[0])
        if first:
            aside.mkdir()
        dist.barrier()
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
        save(flatten(tensors), storage_writer=writer)
        # Each process reads what it has just written, from the cache of its own machine.
        own = sorted(aside.glob(f"shard-{dist.get_rank() + 1:05d}-*"))
        digests: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(digests, {file.name: [file.stat().st_size, sha256_file(file)] for file in own})
        if first:
            listed = {name: entry for part in digests for name, entry in part.items()}
            torch.save({**rest, DIGESTS: listed}, aside / STATE)
            for file in aside.iterdir():
                sync(file)
            place_folder(aside, path, replace=True)
    dist.barrier()


def load_sharded(tensors: Mapping[str, Any], path: Path) -> None:
    """Loads tensors in place, nested by names, from a folder of shards; every process calls it."""
    load(flatten(tensors), storage_reader=HuggingFaceStorageReader(str(path)))


def read_state(path: Path) -> dict[str, Any]:
    """Values other than tensors in a folder of shards."""
    state: dict[str, Any] = torch.load(path / STATE, weights_only=True)
    return state


def names(path: Path) -> set[str]:
    """Names of the tensors in a folder of shards."""
    found: set[str] = set()
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            found.update(shard.keys())
    return found


def read_unsharded(path: Path, below: str = "") -> dict[str, Any]:
    """Returns the unsharded tensors of a folder, nested by names, in a single process.

    Args:
        path: Folder of shards.
        below: Prefix of the names of the tensors to read. Defaults to all.
    """
    reader = HuggingFaceStorageReader(str(path))
    known = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in known.items()
        if name.startswith(below) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose
        load(tensors, storage_reader=reader, no_dist=True)
    return unflatten(tensors)


def remove(path: Path) -> None:
    """Removes a checkpoint, a file or a folder, without leaving part of it under its name."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with workspace(path) as folder:
        removed = new_path(folder)
        path.rename(removed)
        shutil.rmtree(removed)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Joins nested names by slashes.

    Example:
        >>> flatten({"model": {"weight": torch.ones(())}})
        {'model/weight': tensor(1.)}
    """
    flat: dict[str, Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}{_SEPARATOR}")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def unflatten(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """Reverses `flatten`."""
    tree: dict[str, Any] = {}
    for name, tensor in flat.items():
        *path, last = name.split(_SEPARATOR)
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = tensor
    return tree
